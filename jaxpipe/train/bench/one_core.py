"""T1: the step without a pipeline, timed in a process of its own that has one core."""

import multiprocessing as mp
import os
import time
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.runtime.mesh import simulate_devices
from jaxpipe.runtime.sequential import sequential
from jaxpipe.train.bench.case import Workload
from jaxpipe.train.bench.memory import keep_freed_memory


class OneCore:
    """A process pinned to one core that times single-device steps while the context lasts.

    Args:
        workload: Model and microbatch.
    """

    def __init__(self, workload: Workload):
        context = mp.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, workload), daemon=True)

    def __enter__(self) -> "OneCore":
        self._process.start()
        return self

    def __exit__(self, *_) -> None:
        self._pipe.send(0)
        self._process.join()

    def seconds(self, microbatches: int) -> float:
        """Times one step: loss and gradients of so many microbatches, added up one after the other."""
        self._pipe.send(microbatches)
        return self._pipe.recv()


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


def _serve(pipe: Any, workload: Workload) -> None:
    """For each number of microbatches that it is sent, times a step; ends at 0."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    keep_freed_memory()
    simulate_devices(1)
    params, step = accumulation_step(workload)
    while microbatches := pipe.recv():
        groups = in_groups(workload.batch(microbatches), microbatches)
        start = time.perf_counter()
        jax.block_until_ready(step(params, groups))
        pipe.send(time.perf_counter() - start)
