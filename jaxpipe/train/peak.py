"""What share of the devices' arithmetic a run uses, where the devices' peak is known."""

from typing import Any

import jax

from jaxpipe.runtime.arithmetic import dot_flops
from jaxpipe.runtime.mesh import batch_shards
from jaxpipe.runtime.sequential import sequential

PEAKS = {
    "A100": {"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12},
    "H100 80GB HBM3": {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12},
    "H100 PCIe": {"bfloat16": 756e12, "float16": 756e12, "float32": 51e12},
    "H200": {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12},
    "L40S": {"bfloat16": 362e12, "float16": 362e12, "float32": 91.6e12},
    "V100": {"float16": 125e12, "float32": 15.7e12},
}
"""Dense floating-point operations per second of matrix products, from NVIDIA's data sheets, by a part of the name."""


def peak_flops(kind: str, dtype: str) -> float | None:
    """What a device can do per second, or None where nobody knows.

    Example:
        >>> peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16")
        312000000000000.0
        >>> peak_flops("cpu", "float32") is None
        True
    """
    return next((peaks.get(dtype) for name, peaks in PEAKS.items() if name in kind), None)


def peak_steps_per_s(pipe: Any, batch: Any, dtype: str) -> float | None:
    """Training steps per second if all devices did nothing but the model's matrix products at their peak.

    A step counts three times its forward: recomputation is overhead, not use.

    Args:
        pipe: A `Pipeline`.
        batch: A batch, arrays or shapes.
        dtype: That the model computes in.
    """
    device = pipe.mesh.devices.flat[0]
    peak = peak_flops(device.device_kind, dtype)
    if peak is None:
        return None
    groups = pipe.schedule.microbatches * batch_shards(pipe.mesh)
    model, key = sequential(pipe.model, groups), jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    canonical = jax.eval_shape(model.init, key, shapes)
    return peak * pipe.mesh.size / (3 * dot_flops(model.loss, canonical, shapes))
