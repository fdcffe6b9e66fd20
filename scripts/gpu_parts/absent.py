"""H100s that are not there, for ``--compile-only``. Needs all that `pip install 'jaxpipe[gpu-aot]'` brings."""

from functools import cache
from typing import Any

import jax

from jaxpipe.jax_internals import cudnn_checks


@cache
def h100s(count: int) -> list[Any]:
    """H100s to compile for, whose fused attention compiles too."""
    from jaxpipe.measure.targets import h100_devices

    _trust_cudnn()
    return h100_devices(count)


def _trust_cudnn() -> None:
    """JAX asks the present GPU for its cuDNN and its kind before it takes cuDNN's attention, and there is none."""
    checks = cudnn_checks()
    checks.check_cudnn_version = lambda: 91000
    checks.check_compute_capability = lambda capability: True
    checks.is_cuda_compute_capability_equal = lambda capability: capability == "9.0"
    jax.config.update("jax_platforms", "cpu")
