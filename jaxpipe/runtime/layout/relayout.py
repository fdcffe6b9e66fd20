"""Two layouts of the same parameters, and the way between them.

*Canonical*: ``{"embed", "blocks": {kind: leaves [L_kind, ...]}, "head"}``. Independent of P, V and schedule: what the
oracle, checkpoints and weight conversion use.

*Pipeline*: ``{"embed", "blocks", "head"}`` with ``blocks[c][p]`` the tree of one *position* of every device's c-th
stage, leaves ``[P, ...]`` sharded over `pipe`. Stages of a repeat may hold different numbers and kinds of blocks: then
there is a position for each block of each kind that any of them holds, and a device without a block there holds zeros
that nobody reads. With ``scan`` a position is a run of equal blocks, leaves ``[P, count, ...]``. Positions are separate
arrays because the compiled loop must never slice a stack of weights: that copies them every tick.

Embedding and head are the same in both: each leaf sharded over `pipe` on its first dim that P divides, else replicated.
Over `fsdp` and `tensor` every leaf of either is cut further, see `jaxpipe.runtime.layout.rest`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate, groupby
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxpipe.runtime.layout.mesh import FSDP, PIPE, TENSOR, settled
from jaxpipe.runtime.layout.rest import Rest, Sizes, block_rest, end_rest, slashed
from jaxpipe.runtime.model import Tree
from jaxpipe.schedule import Schedule

Shard = Literal["params", "optimizer"]
"""What lies cut over `fsdp`, see `Pipeline`."""


@dataclass(frozen=True)
class Position:
    """A place for blocks of one kind in the stages of one repeat.

    Attributes:
        kind: Of the blocks.
        index: Which of the repeat's places for this kind.
        rows: By device, the numbers of its blocks among those of the kind: one, or a run of them; none where the device
            has no block here.
        count: Blocks that there is room for; None for one without a dim of its own.
    """

    kind: str
    index: int
    rows: tuple[tuple[int, ...], ...]
    count: int | None

    @property
    def lead(self) -> int:
        """Dims of a leaf before the block's own."""
        return 1 if self.count is None else 2

    @property
    def room(self) -> int:
        """Blocks per device."""
        return self.count or 1

    def padded(self, rows: tuple[int, ...], empty: int) -> list[int]:
        """A device's rows, and `empty` where there is room for more."""
        return [*rows, *[empty] * (self.room - len(rows))]

    @property
    def real(self) -> np.ndarray:
        """Which places hold a block: bools ``[P]``, or ``[P, count]``."""
        held = np.array([[n < len(rows) for n in range(self.room)] for rows in self.rows])
        return held[:, 0] if self.count is None else held


@dataclass(frozen=True)
class Layout:
    """Where each block of a model lives.

    Attributes:
        mesh: The mesh.
        schedule: Devices, repeats and placement are read off it.
        kinds: The kind of each block, in model order.
        counts: Blocks per stage, in stage order.
        scan: Whether equal neighbours in a stage are stacked.
        tensor: The dims that lie on the axis `tensor`, by path, for ``embed``, ``head`` and ``blocks/KIND``.
        shard: Whether parameters are cut over `fsdp`, or gradients and optimizer state only.
    """

    mesh: Mesh
    schedule: Schedule
    kinds: tuple[str, ...]
    counts: tuple[int, ...]
    scan: bool = False
    tensor: Mapping[str, Mapping[str, int]] = field(default_factory=dict, hash=False)
    shard: Shard = "params"

    @cached_property
    def first(self) -> tuple[int, ...]:
        """The number of each stage's first block."""
        return (0, *accumulate(self.counts))[:-1]

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """The number of each block among those of its kind."""
        return tuple(self.kinds[:n].count(kind) for n, kind in enumerate(self.kinds))

    def runs(self, stage: int) -> list[list[int]]:
        """The blocks of a stage, those that share a position together."""
        blocks = range(self.first[stage], self.first[stage] + self.counts[stage])
        if not self.scan:
            return [[block] for block in blocks]
        return [list(group) for _, group in groupby(blocks, key=lambda block: self.kinds[block])]

    @cached_property
    def places(self) -> tuple[tuple[int, ...], ...]:
        """By stage, the position of each of its runs."""
        found = []
        for stage in range(self.schedule.stages):
            numbers: dict[str, int] = {}
            own = []
            for run in self.runs(stage):
                kind = self.kinds[run[0]]
                index = numbers[kind] = numbers.get(kind, -1) + 1
                repeat = self.schedule.repeat_of(stage)
                own.append(self.keys[repeat].index((kind, index)))
            found.append(tuple(own))
        return tuple(found)

    @cached_property
    def keys(self) -> tuple[tuple[tuple[str, int], ...], ...]:
        """By repeat, ``(kind, index)`` of its positions."""
        found = []
        for repeat in range(self.schedule.repeats):
            most: dict[str, int] = {}
            for stage in self._stages(repeat):
                kinds = [self.kinds[run[0]] for run in self.runs(stage)]
                for kind in kinds:
                    most[kind] = max(most.get(kind, 0), kinds.count(kind))
            found.append(tuple((kind, index) for kind, count in most.items() for index in range(count)))
        return tuple(found)

    @cached_property
    def positions(self) -> tuple[tuple[Position, ...], ...]:
        """By repeat, its positions."""
        found = []
        for repeat, keys in enumerate(self.keys):
            row = []
            for p, (kind, index) in enumerate(keys):
                held: list[tuple[int, ...]] = []
                for stage in self._stages(repeat):
                    at = dict(zip(self.places[stage], self.runs(stage), strict=True))
                    held.append(tuple(self.rows[block] for block in at.get(p, ())))
                count = max(map(len, held)) if self.scan else None
                row.append(Position(kind, index, tuple(held), count))
            found.append(tuple(row))
        return tuple(found)

    def _stages(self, repeat: int) -> list[int]:
        """The stages of a repeat, by device."""
        return [self.schedule.stage_at(device, repeat) for device in range(self.schedule.devices)]

    @property
    def sizes(self) -> Sizes:
        """The sizes of the axes that leaves are cut over."""
        return Sizes(self.schedule.devices, self.mesh.shape[FSDP], self.mesh.shape.get(TENSOR, 1))

    def rest(self, path: Sequence[Any], shape: Sequence[int]) -> Rest:
        """How a leaf of the pipeline tree rests, its gradient and what an optimizer keeps for it.

        Args:
            path: JAX's keys.
            shape: Of the whole leaf.
        """
        part = path[0].key
        if part != "blocks":
            return end_rest(shape, self.sizes, self._tensor_dim(part, path[1:]))
        position = self.positions[path[1].idx][path[2].idx]
        return block_rest(shape, position.lead, self.sizes, self._tensor_dim(f"blocks/{position.kind}", path[3:]))

    def rests(self, params: Tree) -> Tree:
        """`rest` of all leaves of a pipeline tree (arrays or shapes), or of some of its parts."""
        return jax.tree.map_with_path(lambda path, x: self.rest(path, x.shape), params)

    def specs(self, params: Tree) -> Tree:
        """Partition specs of a pipeline tree (arrays or shapes) of parameters."""
        return jax.tree.map(self.param_spec, self.rests(params))

    def param_spec(self, rest: Rest, axes: Sequence[str] = (PIPE, FSDP, TENSOR)):
        """The partition spec, of some axes, of a parameter whose gradient rests so."""
        return rest.spec([axis for axis in axes if axis != FSDP or self.shard == "params"])

    def shardings(self, params: Tree) -> Tree:
        """`specs` as shardings on the mesh."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.specs(params))

    def constrain(self, tree: Tree, spec: Callable[[Rest], Any]) -> Tree:
        """A pipeline tree, inside `jax.jit`, with each leaf as ``spec(its rest)`` says."""

        def place(path, leaf):
            rests = NamedSharding(self.mesh, spec(self.rest(path, leaf.shape)))
            return jax.lax.with_sharding_constraint(leaf, rests)

        return jax.tree.map_with_path(place, tree)

    def canonical_sharding(self, path: Sequence[Any], shape: Sequence[int]) -> NamedSharding:
        """How a leaf of a canonical tree rests on the mesh."""
        part, below = path[0].key, path[1:]
        dim = self._tensor_dim(part, below)
        if part == "blocks":
            dim = self._tensor_dim(f"blocks/{below[0].key}", below[1:])
            dim = None if dim is None else dim + 1
        return NamedSharding(self.mesh, end_rest(shape, self.sizes, dim).spec())

    def state_sharding(self, path: Sequence[str], shape: Sequence[int]) -> NamedSharding:
        """How a leaf of a training state in the canonical layout rests: like the parameter whose path is in its own."""
        at = next((n for n, name in enumerate(path) if name in ("embed", "blocks", "head")), None)
        dim = None
        if at is not None:
            lead = 1 if path[at] == "blocks" else 0
            part = "/".join(path[at : at + 1 + lead])
            own = self.tensor.get(part, {}).get("/".join(path[at + 1 + lead :]))
            dim = own + lead if own is not None and own + lead < len(shape) else None
        return NamedSharding(self.mesh, end_rest(shape, self.sizes, dim).spec())

    def _tensor_dim(self, part: str, path: Sequence[Any]) -> int | None:
        return self.tensor.get(part, {}).get(slashed(path))

    def to_canonical(self, params: Tree) -> Tree:
        """The canonical tree of pipeline parameters, leaf by leaf on the devices.

        Args:
            params: A pipeline tree; its arrays stay valid.
        """
        stacked = {}
        for kind in dict.fromkeys(self.kinds):
            held = self._held(kind)
            trees = [params["blocks"][repeat][p] for repeat, p, _ in held]
            positions = tuple(position for *_, position in held)
            leaves = zip(*map(jax.tree.leaves, trees), strict=True)
            flat, structure = jax.tree.flatten_with_path({"blocks": {kind: trees[0]}})
            moved = []
            for own, (path, leaf) in zip(leaves, flat, strict=True):
                shape = self.kinds.count(kind), *leaf.shape[positions[0].lead :]
                moved.append(settled(_stack(positions, own, self.canonical_sharding(path, shape))))
            stacked[kind] = jax.tree.unflatten(structure, moved)["blocks"][kind]
        return {**params, "blocks": stacked}

    def from_canonical(self, canonical: Tree) -> Tree:
        """The pipeline tree of canonical parameters, leaf by leaf on the devices.

        Args:
            canonical: A canonical tree of arrays with the model's blocks, on the mesh or on the host; its arrays stay
                valid.
        """
        kinds = sorted(canonical["blocks"])
        blocks: list[list[Tree]] = [[None] * len(row) for row in self.positions]
        for kind in kinds:
            held = self._held(kind)
            positions = tuple(position for *_, position in held)
            first = [jax.tree_util.SequenceKey(n) for n in held[0][:2]]
            flat, structure = jax.tree.flatten_with_path({"blocks": {kind: canonical["blocks"][kind]}})
            moved = []
            for path, leaf in flat:
                shape = (*positions[0].real.shape, *leaf.shape[1:])
                spec = self.param_spec(self.rest((path[0], *first, *path[2:]), shape))
                leaf = jax.device_put(leaf, self.canonical_sharding(path, leaf.shape))
                moved.append(settled(_cut(positions, leaf, NamedSharding(self.mesh, spec))))
            for n, (repeat, p, _) in enumerate(held):
                blocks[repeat][p] = jax.tree.unflatten(structure, [leaf[n] for leaf in moved])["blocks"][kind]

        def put(path, leaf):
            # A leaf that is in place already would be the caller's own array, which a donation would delete.
            rests = NamedSharding(self.mesh, self.param_spec(self.rest(path, leaf.shape)))
            return jax.device_put(leaf, rests, may_alias=False)

        ends = jax.tree.map_with_path(put, {part: canonical[part] for part in ("embed", "head")})
        return {**canonical, **ends, "blocks": blocks}

    def _held(self, kind: str) -> list[tuple[int, int, Position]]:
        """The positions of a kind, as (repeat, place in the repeat, position)."""
        return [
            (repeat, p, position)
            for repeat, row in enumerate(self.positions)
            for p, position in enumerate(row)
            if position.kind == kind
        ]


@partial(jax.jit, static_argnums=(0, 2))
def _stack(positions: Sequence[Position], leaves: Sequence, sharding: NamedSharding):
    return jax.lax.with_sharding_constraint(stack_rows(positions, leaves), sharding)


def stack_rows(positions: Sequence[Position], leaves: Sequence):
    """Leaves ``[P, ...]`` of the positions of a kind as one ``[L_kind, ...]``; NumPy's stay so."""
    rest = leaves[0].shape[positions[0].lead :]
    xp = np if isinstance(leaves[0], np.ndarray) else jnp
    flat = xp.concatenate([leaf.reshape(-1, *rest) for leaf in leaves])
    rows = [row for position in positions for rows in position.rows for row in position.padded(rows, -1)]
    place = {row: at for at, row in enumerate(rows)}
    return flat[np.array([place[row] for row in range(len(place) - (-1 in place))])]


@partial(jax.jit, static_argnums=(0, 2))
def _cut(positions: Sequence[Position], leaf, sharding: NamedSharding) -> list:
    return [jax.lax.with_sharding_constraint(rows, sharding) for rows in cut_rows(positions, leaf)]


def cut_rows(positions: Sequence[Position], leaf) -> list:
    """One leaf ``[L_kind, ...]`` as those of the positions of the kind, ``[P, ...]`` each."""
    outs = []
    for position in positions:
        order = np.array([position.padded(rows, -1) for rows in position.rows])
        rows = leaf[np.maximum(order, 0)]
        if (order < 0).any():
            rows = jnp.where((order >= 0).reshape(*order.shape, *[1] * (leaf.ndim - 1)), rows, 0)
        outs.append(rows[:, 0] if position.count is None else rows)
    return outs
