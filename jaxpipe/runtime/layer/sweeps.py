"""Blocks as a pipelined function: one sweep forwards, and when gradients come back, one backwards.

`Pipeline` knows the loss and starts backwards while forwards still run: memory of 1F1B. Here the loss is somewhere in
the caller's program, so every forward comes before every backward, and each stage's input rests in between: memory
grows with the microbatches. Each sweep is a loop over a tick table with the lanes of `Pipeline`; the two are tied
together by a `custom_vjp`, so that nothing is ever differentiated through a loop.

What goes into the function comes in four kinds:

    x         what the blocks change, a tree of arrays ``[B, ...]``
    riding    arrays ``[B, ...]`` that blocks read and that have gradients: they hop along with `x`
    resting   arrays ``[B, ...]`` without gradients (masks, positions): every device has them and cuts its microbatch
    shared    arrays for all rows, with gradients if they are floating-point: every device has them whole
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from jaxpipe.errors import ConfigError
from jaxpipe.runtime.layer.derivatives import without_derivative
from jaxpipe.runtime.layer.sweep_loops import KIND, BlockCall, Inputs, Loops, make_loops
from jaxpipe.runtime.layout.mesh import PIPE, batch_shards, batch_text, check_axes
from jaxpipe.runtime.layout.relayout import Layout
from jaxpipe.runtime.layout.tree import shapes_of
from jaxpipe.runtime.model import Tree
from jaxpipe.runtime.options import stage_counts, stage_remats
from jaxpipe.runtime.stage import keys
from jaxpipe.runtime.stage.build import check_carry
from jaxpipe.runtime.stage.carry import join, part
from jaxpipe.runtime.stage.stage import Remat
from jaxpipe.schedule import Schedule, TickTable, lower
from jaxpipe.schedule.ir import check_schedule
from jaxpipe.schedule.lowering.lower import lower_sweeps

TWICE = (
    "a pipelined layer has no second derivative (jax.hessian, jax.grad of jax.grad); try one on a mesh with pipe=1, "
    "which is the plain loop over the blocks"
)


@dataclass(frozen=True)
class Sweeps:
    """A run of equal blocks on a mesh.

    Attributes:
        apply: What one block computes: ``(params, x, inputs, key) -> x``, with `key` None for deterministic.
        num_layers: Number of blocks.
        schedule: Any schedule with backwards; its forwards keep their order, and so do its backwards.
        mesh: From `make_mesh`. Rows are split over `data` and `fsdp`; what `tensor` cuts is left to the compiler.
        stages: Blocks per stage, see `Pipeline`.
        remat: What forwards keep for backwards, see `Pipeline`.
        scan_blocks: See `Pipeline`.
    """

    apply: BlockCall
    num_layers: int
    schedule: Schedule
    mesh: Mesh
    stages: Sequence[int] | str | None = None
    remat: Remat | Sequence[Remat] = "full"
    scan_blocks: bool = False

    def __post_init__(self):
        check_axes(self.mesh)
        check_schedule(self.schedule)
        if self.mesh.shape[PIPE] != self.schedule.devices:
            raise ConfigError(
                f"mesh.pipe={self.mesh.shape[PIPE]} must equal the schedule's devices={self.schedule.devices}; "
                f"try mesh.pipe={self.schedule.devices}"
            )
        assert self.layout and self.table  # what is wrong with them is said now

    @cached_property
    def layout(self) -> Layout:
        """Where the blocks live."""
        counts = stage_counts(self.stages, self.num_layers, self.schedule)
        return Layout(self.mesh, self.schedule, (KIND,) * self.num_layers, counts, self.scan_blocks)

    @cached_property
    def remats(self) -> tuple:
        """What each stage keeps."""
        return stage_remats(self.remat, self.schedule.stages)

    @cached_property
    def table(self) -> TickTable:
        """The tick table of both sweeps."""
        return lower_sweeps(self.schedule, [kept != "full" for kept in self.remats])

    @cached_property
    def forward_table(self) -> TickTable:
        """The tick table of a sweep that nobody goes back through."""
        s = self.schedule
        order = tuple(tuple(a for a in actions if a.phase == "F") for actions in s.order)
        return lower(Schedule("inference", s.devices, s.microbatches, s.repeats, s.placement, order))

    @property
    def row_groups(self) -> int:
        """Microbatches on all batch shards."""
        return self.schedule.microbatches * batch_shards(self.mesh)

    def __call__(self, params: Tree, x: Tree, inputs: Inputs, key=None) -> Tree:
        """The last block's output.

        Args:
            params: The blocks' parameters, leaves ``[num_layers, ...]``.
            x: The first block's input, leaves ``[B, ...]``.
            inputs: The rest, see the module; leaves ``[B, ...]`` but for those of `shared`.
            key: A `jax.random` key or None.

        Raises:
            ConfigError: B does not divide into microbatches, or the axis `pipe` is already manual.
            PartitionError: A block does not return what it was given.
        """
        leaves = jax.tree.leaves(x)
        if not leaves or not jnp.shape(leaves[0]):
            found = "holds no array" if not leaves else f"is {jnp.result_type(leaves[0])}[]"
            raise ConfigError(f"x {found} but must be an array [B, …] or a tree of them; try jax.numpy.asarray(x)")
        rows = leaves[0].shape[0]
        for path, leaf in jax.tree.leaves_with_path((x, inputs.riding, inputs.resting)):
            if leaf.shape[:1] != (rows,):
                raise ConfigError(
                    f"input{jax.tree_util.keystr(path)} has shape {list(leaf.shape)} but must have the {rows} rows of "
                    f"x first; try [{rows}, …], or declare it 'shared'"
                )
        if rows % self.row_groups:
            raise ConfigError(
                f"batch size {rows} must be a multiple of microbatches={self.schedule.microbatches} * "
                f"{batch_text(self.mesh)} = {self.row_groups}; "
                f"try {max(1, round(rows / self.row_groups)) * self.row_groups}"
            )
        if PIPE in jax.sharding.get_abstract_mesh().manual_axes:
            raise ConfigError(
                f"the axis {PIPE!r} is already bound by a shard_map around this call; try calling it outside"
            )
        if key is not None and not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        if self.schedule.devices == 1:
            return self._plain(params, x, inputs, key)
        given = {"params": params, "x": x, "riding": inputs.riding, "shared": inputs.shared}
        return self._swept(given, inputs.resting, key)

    def _plain(self, params: Tree, x: Tree, inputs: Inputs, key) -> Tree:
        """One block after the other, for each row group with its own key if there are keys."""

        def group(number, x, riding, resting):
            group_key = keys.group_key(key, number)

            def one(x, layer):
                own, block = layer
                apply = jax.checkpoint(self.apply) if self.remats[0] == "full" else self.apply
                known = Inputs(riding, resting, inputs.shared)
                y = apply(own, x, known, keys.block_key(group_key, block))
                check_carry(0, x, y)
                return y, None

            return lax.scan(one, x, (params, jnp.arange(self.num_layers, dtype=jnp.int32)))[0]

        batched = x, inputs.riding, inputs.resting
        if key is None:
            return group(0, *batched)
        cut = jax.tree.map(lambda leaf: leaf.reshape(self.row_groups, -1, *leaf.shape[1:]), batched)
        y = lax.map(lambda args: group(args[0], *args[1]), (jnp.arange(self.row_groups), cut))
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), y)

    def _swept(self, given: dict, resting: Tree, key) -> Tree:
        """The last block's output, with one sweep for its value and another for the gradient of `given`."""
        like = shapes_of(given)

        @jax.custom_vjp
        def call(floating, others, resting, key):
            known = join(like, floating, others), resting, key
            return self._loops(self.forward_table, *known).forward(*known)[0]

        def forward(floating, others, resting, key):
            known = join(like, floating, others), resting, key
            y, stash = without_derivative(self._loops(self.table, *known).forward, TWICE)(*known)
            return y, (floating, others, resting, key, stash)

        def backward(residuals, dy):
            floating, others, resting, key, stash = residuals
            known = join(like, floating, others), resting, key
            run = without_derivative(self._loops(self.table, *known).backward, TWICE)
            gradients = run(*known, stash, part(dy)[0])
            cast = [g.astype(leaf.dtype) for g, leaf in zip(gradients, floating, strict=True)]
            return cast, None, None, None

        call.defvjp(forward, backward)
        return call(*part(given), resting, key)

    def _loops(self, table: TickTable, given: dict, resting: Tree, key) -> Loops:
        """The compiled loops over a table for arrays of these shapes, made once."""
        shapes = shapes_of((given, resting))
        leaves, structure = jax.tree.flatten(shapes)
        signature = table is self.table, key is None, structure, *((leaf.shape, leaf.dtype) for leaf in leaves)
        if signature not in self._made:
            self._made[signature] = make_loops(
                self.apply, table, self.layout, self.remats, shapes[0], shapes[1], random=key is not None
            )
        return self._made[signature]

    @cached_property
    def _made(self) -> dict[Any, Loops]:
        return {}
