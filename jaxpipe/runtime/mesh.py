"""The device mesh: which devices form the pipeline, and devices simulated on the CPU."""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxpipe.errors import ConfigError

PIPE = "pipe"
DATA = "data"
TENSOR = "tensor"
AXES = (PIPE, DATA, TENSOR)


def make_mesh(pipe: int = 1, data: int = 1, tensor: int = 1, *, devices=None) -> Mesh:
    """Makes a mesh with the axes ``pipe``, ``data`` and ``tensor``.

    `tensor` is innermost (neighbouring devices, the fastest links), then `data`; `pipe` is outermost.

    Args:
        pipe: P, devices that stages are spread over.
        data: Replicas that share the batch.
        tensor: Devices that share one stage; what is sharded over them is left to the compiler.
        devices: The devices to use, in order; by default the first that JAX has.

    Returns:
        A mesh of ``pipe * data * tensor`` devices, all axes of type Auto.

    Raises:
        ConfigError: A size below 1, or more devices asked for than there are.
    """
    sizes = (pipe, data, tensor)
    for name, size in zip(AXES, sizes, strict=True):
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"mesh.{name}={size!r} must be a whole number of at least 1; try 1")
    need = math.prod(sizes)
    given = jax.devices() if devices is None else list(devices)
    if need > len(given):
        asked = " * ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True) if size > 1)
        raise ConfigError(
            f"mesh {asked} needs {need} devices but there {'is' if len(given) == 1 else 'are'} {len(given)} "
            f"({given[0].platform}); try {_nearest(pipe, data * tensor, len(given))}mesh.simulate={need} "
            "to simulate them on the CPU"
        )
    if devices is None and need == len(given) and given[0].platform != "cpu":
        grid = mesh_utils.create_device_mesh(sizes, given)
    else:
        grid = np.asarray(given[:need]).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _nearest(pipe: int, rest: int, available: int) -> str:
    fits = available // rest
    return f"mesh.pipe={min(pipe, fits)} or " if fits >= 1 and min(pipe, fits) > 1 else ""


def simulate_devices(count: int) -> None:
    """Makes the CPU look like `count` devices. Call it before anything else touches JAX's devices.

    Args:
        count: Number of simulated devices, at least 1.

    Raises:
        ConfigError: `count` is below 1, or JAX's devices were already in use with another number of them.
    """
    if not isinstance(count, int) or count < 1:
        raise ConfigError(f"mesh.simulate={count!r} must be a whole number of at least 1; try 4")
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        if jax.devices()[0].platform != "cpu" or len(jax.devices()) < count:
            raise ConfigError(
                f"mesh.simulate={count} must be set before JAX starts, and it already runs with {len(jax.devices())} "
                f"{jax.devices()[0].platform} devices; try a new process"
            ) from error
