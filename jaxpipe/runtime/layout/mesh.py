"""The device mesh: which devices form the pipeline, and devices simulated on the CPU."""

import math
import os
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, Never

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxpipe.errors import ConfigError, one_of_type, whole_number
from jaxpipe.jax_internals import Tracer
from jaxpipe.schedule import Schedule

PIPE = "pipe"
DATA = "data"
FSDP = "fsdp"
TENSOR = "tensor"
AXES = (PIPE, DATA, FSDP, TENSOR)
NEAR = {
    "expert": FSDP,
    "ep": FSDP,
    "model": TENSOR,
    "tp": TENSOR,
    "stage": PIPE,
    "pp": PIPE,
    "dp": DATA,
    "batch": DATA,
}
"""The axis here that does what others call by other names; the weights of experts lie cut over `fsdp`."""
BATCH = (DATA, FSDP)
"""The axes that share the batch: row groups are numbered over them, `data` first."""
MANUAL = (PIPE, DATA, FSDP)
"""The axes that the compiled loop handles itself; `tensor` is left to the compiler where it has several devices."""


def make_mesh(
    pipe: int = 1, data: int = 1, fsdp: int = 1, tensor: int = 1, *, devices: Any = None, **others: Never
) -> Mesh:
    """Makes a mesh with the axes ``pipe``, ``data``, ``fsdp`` and ``tensor``.

    `tensor` is innermost (neighbouring devices, the fastest links), then `fsdp` and `data`; `pipe` is outermost and so
    the first to cross hosts. On accelerators the order within a host follows the links, as JAX knows them.

    Args:
        pipe: P, devices that stages are spread over.
        data: Replicas that share the batch.
        fsdp: Devices that share the batch too, and among them weights, gradients and optimizer state.
        tensor: Devices that share one stage; what is sharded over them is left to the compiler.
        devices: The devices to use, in order; by default the first that JAX has.
        others: Nothing: there are no other axes.

    Returns:
        A mesh of ``pipe * data * fsdp * tensor`` devices, all axes of type Auto.

    Raises:
        ConfigError: A size below 1, an axis that there is not, more devices asked for than there are, or with several
            processes fewer.
    """
    for name, size in others.items():
        near = NEAR.get(name) or get_close_matches(name, AXES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"mesh.{name}={size!r} is no axis; there are {', '.join(AXES)}; try {near}={size!r}")
    sizes = tuple(
        whole_number(f"mesh.{name}", size) for name, size in zip(AXES, (pipe, data, fsdp, tensor), strict=True)
    )
    given = jax.devices() if devices is None else _listed_devices(devices)
    _check_number(sizes, given)
    need = math.prod(sizes)
    if devices is None and need == len(given) and given[0].platform != "cpu":
        grid = by_links(sizes, given)
    else:
        grid = np.asarray(given[:need]).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _listed_devices(devices: Any) -> list:
    """The devices that a user gave.

    Raises:
        ConfigError: They are none, or something else.
    """
    given = list(np.asarray(devices, object).flat) if isinstance(devices, Iterable) else [devices]
    if not given or not all(hasattr(device, "process_index") for device in given):
        raise ConfigError(f"devices={devices!r} must be a sequence of JAX's devices; try jax.devices()[:2]")
    return given


def check_axes(mesh: Mesh) -> None:
    """Raises ConfigError for anything but a mesh, or for one without the axes that the loop handles."""
    one_of_type("mesh", mesh, Mesh, "jaxpipe.make_mesh(pipe=2)", ConfigError)
    for axis in MANUAL:
        if axis not in mesh.shape:
            raise ConfigError(f"mesh axes={tuple(mesh.shape)} must hold {axis!r}; try jaxpipe.make_mesh(pipe=…)")


def manual_axes(mesh: Mesh) -> set[str]:
    """The axes over which a loop's `shard_map` is manual: `MANUAL`, and all others of one device.

    An axis of one device would do no harm if it were left to the compiler, but some operations, cuDNN's attention among
    them, cannot be traced at all in a `shard_map` that is manual over a part of the mesh.
    """
    return {axis for axis, size in mesh.shape.items() if axis in MANUAL or size == 1}


def batch_shards(mesh: Mesh) -> int:
    """How many parts the batch is cut into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def batch_text(mesh: Mesh) -> str:
    """The axes that share the batch, with their sizes, for messages."""
    used = [axis for axis in BATCH if mesh.shape[axis] > 1] or [DATA]
    return " * ".join(f"{axis}={mesh.shape[axis]}" for axis in used)


def describe(mesh: Mesh, schedule: Schedule | None = None) -> str:
    """Which processes and devices hold which part of the pipeline, as text.

    Args:
        mesh: From `make_mesh`.
        schedule: What runs, to say stages; without it only places on the axis `pipe` are said.

    Example:
        >>> from jaxpipe.schedule import build
        >>> print(describe(make_mesh(pipe=2, data=2), build("interleaved_1f1b", devices=2, microbatches=2, repeats=2)))
        mesh       pipe=2 × data=2 × fsdp=1 × tensor=1, 4 devices, 1 process
        pipe 0     stages 0, 2   process 0   devices 0, 1
        pipe 1     stages 1, 3   process 0   devices 2, 3
    """
    check_axes(mesh)
    processes = {device.process_index for device in mesh.devices.flat}
    sizes = " × ".join(f"{name}={size}" for name, size in mesh.shape.items())
    plural = "" if len(processes) == 1 else "es"
    rows = [[f"{'mesh':<10} {sizes}, {mesh.size} devices, {len(processes)} process{plural}"]]
    pipe = mesh.axis_names.index(PIPE)
    for place in range(mesh.shape[PIPE]):
        held = np.take(mesh.devices, place, axis=pipe).reshape(-1)
        stages = [] if schedule is None else [schedule.stage_at(place, c) for c in range(schedule.repeats)]
        owners = sorted({device.process_index for device in held})
        parts = [("stage", sorted(stages)), ("process", owners), ("device", [device.id for device in held])]
        rows.append(
            [f"{f'pipe {place}':<10} " + "   ".join(_listed(noun, numbers) for noun, numbers in parts if numbers)]
        )
    return "\n".join(line for (line,) in rows)


def _listed(noun: str, numbers: Sequence[int]) -> str:
    plural = {"process": "processes"}.get(noun, f"{noun}s")
    if (noun == "process" and len(numbers) == 1) or (noun == "stage" and len(numbers) == 1):
        plural = noun
    return f"{plural} {', '.join(map(str, numbers))}"


def _check_number(sizes: Sequence[int], given: Sequence) -> None:
    """Raises ConfigError where the devices are too few, or where processes would be left over."""
    need, have = math.prod(sizes), len(given)
    names = zip(AXES, sizes, strict=True)
    asked = " * ".join(f"mesh.{name}={size}" for name, size in names if size > 1) or "mesh.pipe=1"
    if need > have:
        near = _nearest(sizes, have)
        raise ConfigError(
            f"{asked} needs {need} devices but there {'is' if have == 1 else 'are'} {have} "
            f"({given[0].platform}); try {f'{near} or ' if near else ''}mesh.simulate={need} "
            "to simulate them on the CPU"
        )
    processes = len({device.process_index for device in given})
    if need < have and processes > 1:
        grow = have // need
        near = f"mesh.data={sizes[1] * grow}" if need * grow == have else (_nearest(sizes, have) or f"mesh.pipe={have}")
        raise ConfigError(
            f"{asked} uses {need} devices but the {processes} processes have {have}, and none may be left over; "
            f"try {near}"
        )


def _nearest(sizes: Sequence[int], available: int) -> str:
    """The one axis to shrink that leaves most devices in use, as ``mesh.axis=size``; empty if none does."""
    need, found = math.prod(sizes), []
    for name, size in zip(AXES, sizes, strict=True):
        fits = min(size, available // (need // size))
        if size > 1 and fits >= 1 and fits * (need // size) > 1:
            found.append((fits * (need // size), f"mesh.{name}={fits}"))
    return max(found, key=lambda pair: pair[0])[1] if found else ""


def by_links(sizes: Sequence[int], devices: Sequence) -> np.ndarray:
    """Devices of accelerators in the order of their links; over several hosts the outer axes cross them.

    Args:
        sizes: Of the axes, outermost first.
        devices: As many as their product.
    """
    granule = next((name for name in ("slice_index", "process_index") if _several(devices, name)), None)
    if granule is not None:
        rest, across = len({getattr(device, granule) for device in devices}), []
        for size in sizes:
            across.append(math.gcd(size, rest))
            rest //= across[-1]
        if rest == 1:
            within = [size // cut for size, cut in zip(sizes, across, strict=True)]
            return mesh_utils.create_hybrid_device_mesh(
                within, across, devices, process_is_granule=granule == "process_index"
            )
    return mesh_utils.create_device_mesh(sizes, devices)


def _several(devices: Sequence, name: str) -> bool:
    """Whether devices differ in an attribute by equal shares of more than one."""
    values = [getattr(device, name, None) for device in devices]
    counts = {values.count(value) for value in set(values)}
    return len(set(values)) > 1 and len(counts) == 1 and counts != {1}


def on_cpu(mesh: Mesh) -> bool:
    """Whether a mesh is of CPU devices, which share the host's threads and memory."""
    return mesh.devices.flat[0].platform == "cpu"


def settled(arrays):
    """The same arrays; on CPUs they are waited for.

    For work that starts many programs: once some 32 with collectives wait for their turn, JAX's CPU devices wait for
    each other for ever, unless they have threads to spare, see `simulate_devices`.
    """
    first = jax.tree.leaves(arrays)[0]
    if isinstance(first, Tracer) or next(iter(first.devices())).platform != "cpu":
        return arrays
    return jax.block_until_ready(arrays)


MAX_SIMULATED = 4096
"""Simulated devices of a process."""


def simulate_devices(count: int) -> None:
    """Makes the CPU look like `count` devices. Call it before anything else touches JAX's devices.

    Each gets two threads (by ``NPROC`` in the environment, which XLA reads; one that is set stays). With one alone, as
    on machines with fewer cores than that, a loop that starts 32 steps and reads no result deadlocks: one thread waits
    in a collective, the other for leave to start the next step.

    Args:
        count: Number of simulated devices, at least 1.

    Raises:
        ConfigError: `count` is below 1, or JAX's devices were already in use with another number of them.
    """
    count = whole_number("mesh.simulate", count)
    if count > MAX_SIMULATED:
        raise ConfigError(f"mesh.simulate={count} must be at most {MAX_SIMULATED}, each has threads of its own; try 8")
    if count > 1:
        os.environ.setdefault("NPROC", str(max(2 * count, os.cpu_count() or 1)))
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        if jax.devices()[0].platform != "cpu" or len(jax.devices()) < count:
            raise ConfigError(
                f"mesh.simulate={count} must be set before JAX starts, and it already runs with {len(jax.devices())} "
                f"{jax.devices()[0].platform} devices; try a new process"
            ) from error
