"""A process's share of what belongs to all: its devices of the mesh, its rows of a batch, a copy of all weights."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.errors import ConfigError
from jaxpipe.hosts.crew import Crew

Rows = dict[str, np.ndarray]


def check_mesh(mesh: Mesh) -> None:
    """Checks that every process has devices in the mesh: one that has none could not follow the program.

    Raises:
        ConfigError: A process has none.
    """
    without = sorted(set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat})
    if without:
        axes = " * ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1) or "of one device"
        raise ConfigError(
            f"mesh {axes} has {mesh.size} of the {jax.device_count()} devices of {jax.process_count()} processes, and "
            f"none of process {without[0]}; try mesh.data={mesh.shape['data'] * (jax.device_count() // mesh.size)} or "
            "fewer processes"
        )


def check_crew(crew: Crew | None) -> None:
    """Checks that JAX has several processes only where they can stop and fail together.

    Raises:
        ConfigError: JAX was started with several processes by hand.
    """
    if crew is None and jax.process_count() > 1:
        raise ConfigError(
            f"{jax.process_count()} processes of JAX must train as a crew, or one of them would wait for ever when "
            "another fails; try jaxpipe.hosts.join and start_jax instead of jax.distributed.initialize"
        )


def put_rows(read: Callable[[int, int], Rows], num_rows: int, sharding: NamedSharding) -> dict[str, jax.Array]:
    """A batch on the devices of all processes, of which this one reads the rows that its own devices hold.

    Args:
        read: ``(first, stop) -> leaves [stop - first, ...]``, rows of the batch.
        num_rows: Rows of the whole batch.
        sharding: How a leaf rests; only its first dim may be cut.
    """
    indices: dict[Any, Any] = dict(sharding.addressable_devices_indices_map((num_rows,)))
    spans: dict[Any, tuple[int, int]] = {device: rows.indices(num_rows)[:2] for device, (rows,) in indices.items()}
    read_once = {span: read(*span) for span in sorted(set(spans.values()))}
    names = next(iter(read_once.values()))

    def place(name: str) -> jax.Array:
        leaf = names[name]
        parts = [jax.device_put(read_once[span][name], device) for device, span in spans.items()]
        return jax.make_array_from_single_device_arrays((num_rows, *leaf.shape[1:]), sharding, parts)

    return {name: place(name) for name in names}


def here(tree: Any, mesh: Mesh) -> Any:
    """Copies of whole arrays on one device of this process. All processes must call it."""
    if jax.process_count() == 1:
        return jax.device_put(tree, mesh.devices.flat[0])
    whole = NamedSharding(mesh, PartitionSpec())
    gather = jax.jit(lambda leaf: leaf, out_shardings=whole)
    return jax.tree.map(lambda leaf: gather(leaf).addressable_data(0), tree)
