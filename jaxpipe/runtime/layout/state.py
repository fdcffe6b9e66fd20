"""The canonical layout of everything that mirrors parameters: the optimizer's state beside the parameters themselves.

A pipeline's optimizer keeps, for each block leaf of the pipeline tree, state with the same lanes (see
`jaxpipe.runtime.layout.logical`): its path holds the path of the parameter. Those leaves are stacked to ``[L_kind,
...]`` like the parameters. What belongs to the embedding or the head, and what is global, is the same in both layouts.

The way from one to the other is cut into chunks, so that the devices never hold the whole state twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxpipe.errors import ConfigError
from jaxpipe.runtime.layout.checksum import checksum, host_checksum
from jaxpipe.runtime.layout.logical import block_paths, find_path
from jaxpipe.runtime.layout.relayout import Layout, Position, cut_rows, stack_rows
from jaxpipe.runtime.layout.tree import Tree

CHUNK_BYTES = 2**28
"""Bytes per device that move at once."""


@dataclass(frozen=True)
class CanonicalLeaf:
    """A leaf in the canonical layout, and where its numbers are in the pipeline's.

    Attributes:
        path: Names from the root of the canonical tree, such as ``("params", "blocks", "block", "attn", "kernel")``.
        sources: Places of the pipeline's leaves among those of the flattened state; one outside of blocks.
        positions: Of each source; none outside of blocks.
        shape: Of the canonical leaf.
        dtype: Of the canonical leaf.
        sharding: How the canonical leaf rests on the mesh.
    """

    path: tuple[str, ...]
    sources: tuple[int, ...]
    positions: tuple[Position, ...]
    shape: tuple[int, ...]
    dtype: Any
    sharding: Sharding

    @property
    def name(self) -> str:
        """The path as one word."""
        return "/".join(self.path)

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """Shape, dtype and sharding."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.sharding)


class StateLayout:
    """The two layouts of a training state.

    Args:
        layout: The pipeline's.
        state: A tree with the pipeline's parameters at `params` and anything that mirrors them elsewhere; arrays or
            shapes with shardings.
        params: The parameters in it.

    Attributes:
        leaves: The canonical leaves.
        rest: Shapes and shardings of the flattened state in the pipeline's layout.

    Raises:
        ConfigError: A leaf of the state belongs to some blocks of a kind and not to others.
    """

    def __init__(self, layout: Layout, state: Tree, params: Tree):
        self._layout = layout
        paths, self._structure = jax.tree.flatten_with_path(state)
        self.rest = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for _, leaf in paths]
        self.leaves = _canonical_leaves(layout, [path for path, _ in paths], self.rest, block_paths(params))

    @cached_property
    def chunks(self) -> list["Chunk"]:
        """All leaves, in parts small enough to be in memory twice."""
        return self._chunks(self.leaves)

    @property
    def in_params(self) -> list[bool]:
        """Which leaves of the flattened state are parameters."""
        sources = {source for leaf in self.leaves if leaf.path[0] == "params" for source in leaf.sources}
        return [number in sources for number in range(len(self.rest))]

    def chunks_of(self, part: str) -> list["Chunk"]:
        """The leaves below one name of the root, likewise."""
        return self._chunks([leaf for leaf in self.leaves if leaf.path[0] == part])

    def _chunks(self, leaves: Sequence[CanonicalLeaf]) -> list["Chunk"]:
        found: list[list[CanonicalLeaf]] = [[]]
        room = CHUNK_BYTES * self._layout.schedule.devices
        taken = 0
        for leaf in leaves:
            size = prod(leaf.shape) * leaf.dtype.itemsize
            if found[-1] and taken + size > room:
                found.append([])
                taken = 0
            found[-1].append(leaf)
            taken += size
        return [Chunk(tuple(some), self.rest) for some in found]

    def from_host(self, copies: list) -> tuple[list[jax.Array], list]:
        """The canonical leaves, new arrays on the mesh, and their checksums, made without the devices' collectives.

        Args:
            copies: Of the flattened state; each is let go when it has been used.
        """
        wholes, sums = [], []
        for leaf in self.leaves:
            parts = [copies[source] for source in leaf.sources]
            for source in leaf.sources:
                copies[source] = None
            whole: Any = stack_rows(leaf.positions, parts) if leaf.positions else parts[0]
            sums.append(host_checksum(whole))
            wholes.append(jax.device_put(whole, leaf.sharding))
        return wholes, sums

    def flatten(self, state: Tree) -> list:
        """The leaves of a state in the order that `CanonicalLeaf.sources` counts them."""
        return jax.tree.leaves(state)

    def unflatten(self, leaves: Sequence) -> Tree:
        """The state of leaves in that order."""
        return jax.tree.unflatten(self._structure, leaves)


def host_copies(flat: Sequence) -> list[np.ndarray]:
    """Whole copies of arrays that this process has all shards of."""
    return [_host_copy(leaf) for leaf in flat]


def _host_copy(leaf: jax.Array) -> np.ndarray:
    copy = np.empty(leaf.shape, leaf.dtype)
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            copy[shard.index] = np.asarray(shard.data)
    return copy


class Chunk:
    """Some canonical leaves, with one compiled program for each direction.

    Args:
        leaves: The leaves.
        rest: Shapes and shardings of the whole flattened state.
    """

    def __init__(self, leaves: tuple[CanonicalLeaf, ...], rest: Sequence[jax.ShapeDtypeStruct]):
        self.leaves, self._rest = leaves, rest

    @cached_property
    def _gather(self):
        shardings = [leaf.sharding for leaf in self.leaves]

        def gather(groups):
            wholes = [_whole(leaf, group) for leaf, group in zip(self.leaves, groups, strict=True)]
            return wholes, jnp.stack([checksum(whole) for whole in wholes])

        groups = [[self._rest[source] for source in leaf.sources] for leaf in self.leaves]
        return jax.jit(gather, out_shardings=(shardings, None)).lower(groups).compile()

    @cached_property
    def _scatter(self):
        shardings = [[self._rest[source].sharding for source in leaf.sources] for leaf in self.leaves]

        def scatter(wholes):
            parts = [_parts(leaf, whole) for leaf, whole in zip(self.leaves, wholes, strict=True)]
            return parts, jnp.stack([checksum(whole) for whole in wholes])

        return jax.jit(scatter, out_shardings=(shardings, None))

    def compile(self) -> None:
        """Compiles the way to the canonical layout now, so that the first use does not wait for it."""
        _ = self._gather

    def gather(self, flat: Sequence) -> tuple[list[jax.Array], jax.Array]:
        """The canonical leaves, new arrays on the mesh, and their checksums, uint32 ``[leaves, 2]``.

        Args:
            flat: The flattened state, in the pipeline's layout.
        """
        return self._gather([[flat[source] for source in leaf.sources] for leaf in self.leaves])

    def scatter(self, wholes: Sequence, flat: list) -> jax.Array:
        """Puts canonical leaves into a flattened state, in the pipeline's layout.

        Args:
            wholes: Arrays on the mesh, in the order of `leaves`.
            flat: The state; its entries are replaced.

        Returns:
            The checksums of the canonical leaves, uint32 ``[leaves, 2]``.
        """
        groups, sums = self._scatter(wholes)
        for leaf, parts in zip(self.leaves, groups, strict=True):
            for source, part in zip(leaf.sources, parts, strict=True):
                flat[source] = part
        return sums


def _canonical_leaves(layout: Layout, paths: Sequence, rest: Sequence, blocks: set) -> tuple[CanonicalLeaf, ...]:
    """The leaves of the canonical layout, those of a block kind joined, in the order of the state."""
    groups: dict[tuple[str, ...], list[tuple[int, tuple[int, int] | None]]] = {}
    for number, path in enumerate(paths):
        name, place = tuple(map(_word, path)), None
        found = find_path(path, blocks)
        if found is not None:
            at = next(n for n in range(len(path)) if path[n : n + len(found)] == found)
            place = found[1].idx, found[2].idx
            kind = layout.positions[place[0]][place[1]].kind
            name = (*name[: at + 1], kind, *name[at + 3 :])
        groups.setdefault(name, []).append((number, place))
    leaves = []
    for name, members in groups.items():
        sources = tuple(number for number, _ in members)
        positions = tuple(layout.positions[c][p] for c, p in (place for _, place in members if place))
        shape = rest[sources[0]].shape
        if positions:
            kind = positions[0].kind
            held = sum(len(rows) for position in positions for rows in position.rows)
            if held != (count := layout.kinds.count(kind)):
                raise ConfigError(
                    f"the optimizer's state {'/'.join(name)} covers {held} of {count} blocks of kind {kind!r} but must "
                    "cover all or none to be saved; try one mask for all blocks of a kind"
                )
            shape = (count, *shape[positions[0].real.ndim :])
        leaves.append(
            CanonicalLeaf(name, sources, positions, shape, rest[sources[0]].dtype, layout.state_sharding(name, shape))
        )
    return tuple(leaves)


def _word(key: Any) -> str:
    """A key of a tree path as a word."""
    return str(next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name)))


def _whole(leaf: CanonicalLeaf, group: Sequence) -> Any:
    return stack_rows(leaf.positions, group) if leaf.positions else jnp.copy(group[0])


def _parts(leaf: CanonicalLeaf, whole) -> list:
    return cut_rows(leaf.positions, whole) if leaf.positions else [jnp.copy(whole)]
