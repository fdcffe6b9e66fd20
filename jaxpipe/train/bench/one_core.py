"""T1: the step without a pipeline, timed in a process of its own that has one core."""

import multiprocessing as mp
import os
import time
from typing import Any

from jaxpipe.train.bench.case import Workload


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


def _serve(pipe: Any, workload: Workload) -> None:
    """For each number of microbatches that it is sent, times a step; ends at 0."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import jax

    import jaxpipe as jp

    jp.simulate_devices(1)
    oracle = jp.sequential(workload.model(), row_groups=1)
    params = oracle.init(jax.random.key(0), workload.batch(1))

    @jax.jit
    def step(params, groups):
        def one(grads, mb):
            loss, new = oracle.value_and_grad(params, mb)
            return jax.tree.map(jax.numpy.add, grads, new), loss

        return jax.lax.scan(one, jax.tree.map(jax.numpy.zeros_like, params), groups)

    while microbatches := pipe.recv():
        batch = workload.batch(microbatches)
        groups = jax.tree.map(lambda x, m=microbatches: x.reshape(m, -1, *x.shape[1:]), batch)
        start = time.perf_counter()
        jax.block_until_ready(step(params, groups))
        pipe.send(time.perf_counter() - start)
