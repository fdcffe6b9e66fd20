"""Two layouts of the same parameters, and the way between them.

*Canonical*: ``{"embed", "blocks": {kind: leaves [L_kind, ...]}, "head"}``. Independent of P, V and schedule: what the
oracle, checkpoints and weight conversion use.

*Pipeline*: ``{"embed", "blocks", "head"}`` with ``blocks[c][p]`` the tree of one *position* of every device's c-th
stage, leaves ``[P, ...]`` sharded over `pipe`. Stages of a repeat may hold different numbers and kinds of blocks: then
there is a position for each block of each kind that any of them holds, and a device without a block there holds zeros
that nobody reads. With ``scan`` a position is a run of equal blocks, leaves ``[P, count, ...]``. Positions are separate
arrays because the compiled loop must never slice a stack of weights: that copies them every tick.

Embedding and head are the same in both: each leaf sharded over `pipe` on its first dim that P divides, else replicated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, groupby

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.errors import PartitionError
from jaxpipe.runtime.mesh import PIPE
from jaxpipe.runtime.model import Tree
from jaxpipe.schedule import Schedule


def sharded_dim(shape: tuple[int, ...], devices: int) -> int | None:
    """The first dim that the pipe size divides, or None."""
    return next((dim for dim, size in enumerate(shape) if size and size % devices == 0), None) if devices > 1 else None


def end_spec(shape: tuple[int, ...], devices: int) -> PartitionSpec:
    """How a leaf of the embedding or the head rests, and a leaf of a canonical tree too."""
    dim = sharded_dim(shape, devices)
    return PartitionSpec() if dim is None else PartitionSpec(*[None] * dim, PIPE)


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
    """

    mesh: Mesh
    schedule: Schedule
    kinds: tuple[str, ...]
    counts: tuple[int, ...]
    scan: bool = False

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

    def specs(self, params: Tree) -> Tree:
        """Partition specs of a pipeline tree (arrays or shapes)."""
        devices = self.schedule.devices
        ends = {part: jax.tree.map(lambda x: end_spec(x.shape, devices), params[part]) for part in ("embed", "head")}
        return ends | {"blocks": jax.tree.map(lambda _: PartitionSpec(PIPE), params["blocks"])}

    def shardings(self, params: Tree) -> Tree:
        """`specs` as shardings on the mesh."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.specs(params))

    def canonical_sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        """How a canonical leaf rests on the mesh."""
        return NamedSharding(self.mesh, end_spec(shape, self.schedule.devices))

    def to_canonical(self, params: Tree) -> Tree:
        """The canonical tree of pipeline parameters, leaf by leaf on the devices.

        Args:
            params: A pipeline tree; its arrays stay valid.
        """
        stacked = {}
        for kind in dict.fromkeys(self.kinds):
            held = self._held(kind)
            trees = [params["blocks"][repeat][p] for repeat, p, _ in held]
            leaves = zip(*map(jax.tree.leaves, trees), strict=True)

            @jax.jit
            def stack(leaves, positions=tuple(position for *_, position in held)):
                out = stack_rows(positions, leaves)
                return jax.lax.with_sharding_constraint(out, self.canonical_sharding(out.shape))

            stacked[kind] = jax.tree.unflatten(jax.tree.structure(trees[0]), [stack(leaf) for leaf in leaves])
        return {**params, "blocks": stacked}

    def from_canonical(self, canonical: Tree) -> Tree:
        """The pipeline tree of canonical parameters, leaf by leaf on the devices.

        Args:
            canonical: A canonical tree of arrays, on the mesh or on the host; its arrays stay valid.

        Raises:
            PartitionError: The tree has other kinds or another number of blocks than the model.
        """
        kinds, own = sorted(canonical["blocks"]), sorted(set(self.kinds))
        if kinds != own:
            raise PartitionError(f"canonical blocks={kinds} must be of the model's kinds; try {own}")
        for kind in kinds:
            count = self.kinds.count(kind)
            for leaf in jax.tree.leaves(canonical["blocks"][kind]):
                if leaf.shape[0] != count:
                    raise PartitionError(
                        f"canonical blocks have {leaf.shape[0]} layers but the model has {count}; try a model with "
                        f"{leaf.shape[0]} blocks"
                    )
        blocks: list[list[Tree]] = [[None] * len(row) for row in self.positions]
        on_blocks = NamedSharding(self.mesh, PartitionSpec(PIPE))
        for kind in kinds:
            held = self._held(kind)
            leaves, structure = jax.tree.flatten(canonical["blocks"][kind])
            cut = jax.jit(partial(cut_rows, [position for *_, position in held]), out_shardings=on_blocks)
            moved = [cut(jax.device_put(leaf, self.canonical_sharding(leaf.shape))) for leaf in leaves]
            for n, (repeat, p, _) in enumerate(held):
                blocks[repeat][p] = jax.tree.unflatten(structure, [leaf[n] for leaf in moved])

        def put(leaf):
            # A leaf that is in place already would be the caller's own array, which a donation would delete.
            return jax.device_put(leaf, self.canonical_sharding(leaf.shape), may_alias=False)

        ends = {part: jax.tree.map(put, canonical[part]) for part in ("embed", "head")}
        return {**canonical, **ends, "blocks": blocks}

    def _held(self, kind: str) -> list[tuple[int, int, Position]]:
        """The positions of a kind, as (repeat, place in the repeat, position)."""
        return [
            (repeat, p, position)
            for repeat, row in enumerate(self.positions)
            for p, position in enumerate(row)
            if position.kind == kind
        ]


def stack_rows(positions: Sequence[Position], leaves: Sequence):
    """Leaves ``[P, ...]`` of the positions of a kind as one ``[L_kind, ...]``."""
    rest = leaves[0].shape[1 if positions[0].count is None else 2 :]
    flat = jnp.concatenate([leaf.reshape(-1, *rest) for leaf in leaves])
    rows = [row for position in positions for rows in position.rows for row in position.padded(rows, -1)]
    place = {row: at for at, row in enumerate(rows)}
    return flat[np.array([place[row] for row in range(len(place) - (-1 in place))])]


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
