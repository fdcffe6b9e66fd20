"""Two layouts of the same parameters, and the way between them.

*Canonical*: ``{"embed", "blocks": {kind: leaves [L_kind, ...]}, "head"}``. Independent of P, V and schedule: what the
oracle, checkpoints and weight conversion use.

*Pipeline*: ``{"embed", "blocks", "head"}`` with ``blocks[c][j]`` the tree of the j-th block of every device's c-th
stage, leaves ``[P, ...]`` sharded over `pipe`. Repeats and blocks are separate arrays because the compiled loop must
never slice a stack of weights: that copies them every tick.

Embedding and head are the same in both: each leaf sharded over `pipe` on its first dim that P divides, else replicated.
"""

from dataclasses import dataclass

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.errors import PartitionError
from jaxpipe.runtime.mesh import PIPE
from jaxpipe.runtime.model import Tree
from jaxpipe.schedule.ir import Placement


def sharded_dim(shape: tuple[int, ...], devices: int) -> int | None:
    """The first dim that the pipe size divides, or None."""
    return next((dim for dim, size in enumerate(shape) if size and size % devices == 0), None) if devices > 1 else None


def end_spec(shape: tuple[int, ...], devices: int) -> PartitionSpec:
    """How a leaf of the embedding or the head rests, and a leaf of a canonical tree too."""
    dim = sharded_dim(shape, devices)
    return PartitionSpec() if dim is None else PartitionSpec(*[None] * dim, PIPE)


@dataclass(frozen=True)
class Layout:
    """Where each block of a model lives.

    Attributes:
        mesh: The mesh.
        devices: P.
        repeats: V.
        per_stage: k, blocks per stage.
        kind: The blocks' kind.
        placement: Where stages live.
    """

    mesh: Mesh
    devices: int
    repeats: int
    per_stage: int
    kind: str
    placement: Placement

    def block(self, device: int, repeat: int, j: int) -> int:
        """The global number of a device's j-th block of its `repeat`-th stage."""
        place = self.devices - 1 - device if self._backwards(repeat) else device
        return (repeat * self.devices + place) * self.per_stage + j

    def rows(self, repeat: int, j: int) -> list[int]:
        """The blocks that form the leaves ``blocks[repeat][j]``, by device."""
        return [self.block(device, repeat, j) for device in range(self.devices)]

    def specs(self, params: Tree) -> Tree:
        """Partition specs of a pipeline tree (arrays or shapes)."""
        ends = {
            part: jax.tree.map(lambda x: end_spec(x.shape, self.devices), params[part]) for part in ("embed", "head")
        }
        return ends | {"blocks": jax.tree.map(lambda _: PartitionSpec(PIPE), params["blocks"])}

    def shardings(self, params: Tree) -> Tree:
        """`specs` as shardings on the mesh."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.specs(params))

    def canonical_sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        """How a canonical leaf rests on the mesh."""
        return NamedSharding(self.mesh, end_spec(shape, self.devices))

    def to_canonical(self, params: Tree) -> Tree:
        """The canonical tree of pipeline parameters, leaf by leaf on the devices.

        Args:
            params: A pipeline tree; its arrays stay valid.
        """
        blocks = params["blocks"]
        leaves = [[jax.tree.leaves(tree) for tree in stage] for stage in blocks]
        tree = jax.tree.structure(blocks[0][0])
        stacked = [
            self._stack([[leaves[c][j][n] for j in range(self.per_stage)] for c in range(self.repeats)])
            for n in range(tree.num_leaves)
        ]
        return {**params, "blocks": {self.kind: jax.tree.unflatten(tree, stacked)}}

    def from_canonical(self, canonical: Tree) -> Tree:
        """The pipeline tree of canonical parameters, leaf by leaf on the devices.

        Args:
            canonical: A canonical tree of arrays, on the mesh or on the host; its arrays stay valid.

        Raises:
            PartitionError: The tree has other kinds or another number of blocks than the model.
        """
        kinds, count = sorted(canonical["blocks"]), self.devices * self.repeats * self.per_stage
        if kinds != [self.kind]:
            raise PartitionError(f"canonical blocks={kinds} must be of the model's kinds; try [{self.kind!r}]")
        leaves, tree = jax.tree.flatten(canonical["blocks"][self.kind])
        for leaf in leaves:
            if leaf.shape[0] != count:
                raise PartitionError(
                    f"canonical blocks have {leaf.shape[0]} layers but the model has {count}; try a model with "
                    f"{leaf.shape[0]} blocks"
                )
        cut = [self._cut(leaf) for leaf in leaves]
        blocks = [
            [jax.tree.unflatten(tree, [leaf[c][j] for leaf in cut]) for j in range(self.per_stage)]
            for c in range(self.repeats)
        ]
        ends = {
            part: jax.tree.map(lambda x: jax.device_put(x, self.canonical_sharding(x.shape)), canonical[part])
            for part in ("embed", "head")
        }
        return {**canonical, **ends, "blocks": blocks}

    def _stack(self, leaves: list[list]):
        """Leaves ``[V][k]`` of ``[P, ...]`` to one ``[L, ...]``."""
        first = leaves[0][0]
        shape = (self.repeats * self.devices * self.per_stage, *first.shape[1:])

        def stack(leaves):
            stages = [self._turned(c, jax.numpy.stack(stage, axis=1)) for c, stage in enumerate(leaves)]  # [P, k, ...]
            return jax.numpy.stack(stages).reshape(shape)

        return jax.jit(stack, out_shardings=self.canonical_sharding(shape))(leaves)

    def _cut(self, leaf):
        """One leaf ``[L, ...]`` to ``[V][k]`` leaves of ``[P, ...]``."""
        on_blocks = NamedSharding(self.mesh, PartitionSpec(PIPE))
        leaf = jax.device_put(leaf, self.canonical_sharding(leaf.shape))

        def cut(leaf):
            stages = leaf.reshape(self.repeats, self.devices, self.per_stage, *leaf.shape[1:])
            turned = [self._turned(c, stages[c]) for c in range(self.repeats)]
            return [[stage[:, j] for j in range(self.per_stage)] for stage in turned]

        return jax.jit(cut, out_shardings=on_blocks)(leaf)

    def _turned(self, repeat: int, stage):
        """Blocks of a repeat ``[P, ...]`` in model order as those by device, or back."""
        return jax.numpy.flip(stage, 0) if self._backwards(repeat) else stage

    def _backwards(self, repeat: int) -> bool:
        return self.placement == "v" and repeat % 2 == 1
