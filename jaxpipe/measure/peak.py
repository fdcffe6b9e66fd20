"""What share of the devices' arithmetic a run uses, where the devices' peak is known."""

from typing import Any

import jax

from jaxpipe.errors import ConfigError
from jaxpipe.plan import find_device
from jaxpipe.runtime.layout.mesh import batch_shards
from jaxpipe.runtime.layout.tree import shapes_of
from jaxpipe.runtime.measure.arithmetic import dot_flops
from jaxpipe.runtime.sequential import sequential


def peak_flops(kind: str, dtype: str) -> float | None:
    """What a device can do per second, or None where nobody knows.

    Example:
        >>> peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16")
        312000000000000.0
        >>> peak_flops("cpu", "float32") is None
        True
    """
    try:
        device = find_device(kind)
    except ConfigError:
        return None
    # [1] The planner's numbers are of SXM modules; the peak of a CPU is a guess.
    other = device.cores is not None or (device.name == "h100" and "PCIe" in kind)
    return None if other else device.peak_flops.get(dtype)


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
    shapes = shapes_of(batch)
    canonical = jax.eval_shape(model.init, key, shapes)
    return peak * pipe.mesh.size / (3 * dot_flops(model.loss, canonical, shapes))
