"""What is timed in a process of its own that has one core; and T1, the step without a pipeline."""

import multiprocessing as mp
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.measure.bench.case import Workload
from jaxpipe.measure.bench.memory import keep_freed_memory
from jaxpipe.runtime.layout.mesh import simulate_devices
from jaxpipe.runtime.sequential import sequential


class OneCore:
    """A process pinned to one core that times something there while the context lasts.

    Args:
        prepare: ``work -> timed`` with ``timed(*asked) -> seconds``; a function of a module, called in that process.
        work: What it is given.
    """

    def __init__(self, prepare: Callable[[Any], Callable[..., float]], work: Any):
        context = mp.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, prepare, work), daemon=True)

    def __enter__(self) -> "OneCore":
        self._process.start()
        return self

    def __exit__(self, *_) -> None:
        self._pipe.send(None)
        self._process.join()

    def seconds(self, *asked: Any) -> float:
        """Times one run."""
        self._pipe.send(asked)
        return self._pipe.recv()


def timed_step(workload: Workload) -> Callable[[int], float]:
    """For `OneCore`: loss and gradients of so many microbatches, added up one after the other."""
    params, step = accumulation_step(workload)

    def seconds(microbatches: int) -> float:
        groups = in_groups(workload.batch(microbatches), microbatches)
        start = time.perf_counter()
        jax.block_until_ready(step(params, groups))
        return time.perf_counter() - start

    return seconds


def accumulation_step(workload: Workload) -> tuple[Any, Any]:
    """The gradient-accumulation step of the whole model with no pipeline.

    Returns:
        ``(params, step)``: the canonical parameters of key 0, and the jitted ``step(params, groups)``, with groups of
        leaves ``[M, rows, ...]``, which returns the sum of the microbatches' gradients and their losses [M].
    """
    oracle = sequential(workload.model(), row_groups=1)
    params = oracle.init(jax.random.key(0), workload.batch(1))

    @jax.jit
    def step(params, groups):
        def one(grads, mb):
            loss, new = oracle.value_and_grad(params, mb)
            return jax.tree.map(jnp.add, grads, new), loss

        return jax.lax.scan(one, jax.tree.map(jnp.zeros_like, params), groups)

    return params, step


def in_groups(batch: dict, microbatches: int) -> dict:
    """A batch with leaves ``[M, rows, ...]``."""
    return {name: x.reshape(microbatches, -1, *x.shape[1:]) for name, x in batch.items()}


def _serve(pipe: Any, prepare: Callable[[Any], Callable[..., float]], work: Any) -> None:
    """Times a run for everything that it is sent; ends at None."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    keep_freed_memory()
    os.environ.pop("NPROC", None)  # the parent's, whose devices are several
    simulate_devices(1)
    timed = prepare(work)
    while (asked := pipe.recv()) is not None:
        pipe.send(timed(*asked))
