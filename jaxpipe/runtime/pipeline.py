"""The door: checks what the user gives, fixes the program, delegates."""

from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.errors import ConfigError, PartitionError, ScheduleError
from jaxpipe.runtime import keys
from jaxpipe.runtime.compile import Program
from jaxpipe.runtime.ends import Ends
from jaxpipe.runtime.logical import logical_optimizer
from jaxpipe.runtime.mesh import DATA, PIPE
from jaxpipe.runtime.model import Model, Tree
from jaxpipe.runtime.relayout import Layout
from jaxpipe.runtime.sizes import model_bytes
from jaxpipe.runtime.stage import Context, Remat, Stage, cast_dtypes
from jaxpipe.runtime.tree import get_path, set_path, tie, untie
from jaxpipe.schedule import Costs, ModelBytes, Schedule, TickTable, lower

REMATS = ("full", "none", "all")


class Pipeline:
    """A model on a mesh under a schedule: one XLA program per training step.

    Args:
        model: Embedding, blocks and head.
        schedule: Any schedule whose `devices` is the mesh's `pipe` size.
        mesh: From `make_mesh`.
        remat: What a forward keeps for its backward. ``full``: only the stage's input; the backward runs the stage's
            forward again. ``none``: the outputs of matrix products, so that none is computed twice. ``all``: every
            residual.
        packing: See `jaxpipe.schedule.lower`.
        memory: See `jaxpipe.schedule.lower`.
        costs: Relative times of the phases, for ``packing="auto"``; by default those of `remat`.

    Attributes:
        table: The tick table that runs.

    Raises:
        ConfigError: The mesh has another `pipe` size than the schedule, or an option has an unknown value.
        PartitionError: The blocks do not divide into stages, or are of several kinds.
        ScheduleError: The schedule does not verify or cannot be lowered.
    """

    def __init__(
        self,
        model: Model,
        *,
        schedule: Schedule,
        mesh: Mesh,
        remat: Remat = "full",
        packing: Literal["auto", "paired", "single"] = "auto",
        memory: Literal["ideal", "strict"] = "ideal",
        costs: Costs | None = None,
    ):
        if remat not in REMATS:
            raise ConfigError(f"remat={remat!r} must be one of {', '.join(REMATS)}; try 'full'")
        for axis in (PIPE, DATA):
            if axis not in mesh.shape:
                raise ConfigError(f"mesh axes={tuple(mesh.shape)} must hold {axis!r}; try jaxpipe.make_mesh(pipe=…)")
        if mesh.shape[PIPE] != schedule.devices:
            raise ConfigError(
                f"mesh.pipe={mesh.shape[PIPE]} must equal the schedule's devices={schedule.devices}; "
                f"try mesh.pipe={schedule.devices}"
            )
        check_split(len(model.blocks), schedule.devices, schedule.repeats)
        kinds = sorted({block.kind for block in model.blocks})
        if len(kinds) > 1:
            raise PartitionError(f"blocks of kinds {', '.join(kinds)} must all be of one kind; try kind={kinds[0]!r}")
        self.model, self.schedule, self.mesh = model, schedule, mesh
        self.remat: Remat = remat
        recompute = 1.0 if remat == "full" else 0.0
        self.table = lower(schedule, packing, costs or Costs(recompute=recompute), memory)
        per_stage = len(model.blocks) // schedule.stages
        self.layout = Layout(mesh, schedule.devices, schedule.repeats, per_stage, kinds[0], schedule.placement)

    @property
    def batch_sharding(self) -> NamedSharding:
        """How a batch leaf ``[B, ...]`` rests: split over the data axis, a copy on every stage."""
        return NamedSharding(self.mesh, PartitionSpec(DATA))

    def init(self, key, batch: Tree) -> Tree:
        """Makes parameters, sharded on the mesh. The numbers do not depend on mesh or schedule.

        Args:
            key: A `jax.random` key.
            batch: Any batch, arrays or shapes, leaves ``[B, ...]``.

        Returns:
            The pipeline tree: ``{"embed", "blocks", "head"}``, see `jaxpipe.runtime.relayout`.
        """
        model, layout = self.model, self.layout
        mb = self._microbatch(batch)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), mb)
        embed_key, head_key, block_keys = keys.init_keys(key, len(model.blocks))

        def make_ends():
            embed = model.embed.init(embed_key, zeros)
            carry = model.embed.apply(embed, zeros, None)
            return {"embed": embed, "head": untie(model.head_loss.init(head_key, carry, zeros), model.head_tie)}

        carry = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self._carry(mb))
        ends = jax.eval_shape(make_ends)
        shardings = jax.tree.map(lambda s: layout.canonical_sharding(s.shape), ends)
        params = jax.jit(make_ends, out_shardings=shardings)()
        sharding = NamedSharding(self.mesh, PartitionSpec(PIPE))
        inits = {}

        def make_block(c: int, j: int) -> Tree:
            rows = jnp.asarray(layout.rows(c, j))
            init = model.blocks[layout.rows(c, j)[0]].init
            if init not in inits:
                inits[init] = jax.jit(jax.vmap(init, in_axes=(0, None)), out_shardings=sharding)
            return inits[init](block_keys[rows], carry)

        blocks = [[make_block(c, j) for j in range(layout.per_stage)] for c in range(layout.repeats)]
        return {**params, "blocks": blocks}

    def value_and_grad(self, params: Tree, batch: Tree, key=None) -> tuple[Any, Tree]:
        """The mean loss of the batch and its gradient, in one pass of the pipeline. Wrap it in `jax.jit`.

        Args:
            params: From `init` or `from_canonical`.
            batch: Leaves ``[B, ...]`` with B a multiple of microbatches times data shards.
            key: A `jax.random` key for dropout, or None for deterministic.

        Returns:
            The loss (a float32 scalar) and a tree like `params` of float32 gradients.

        Raises:
            ConfigError: B does not divide.
            ScheduleError: The schedule has no backwards.
        """
        if not any(phase.backward for phase in self.table.phases):
            raise ScheduleError(
                f"schedule={self.schedule.name!r} runs forwards only and has no gradient; try Pipeline.loss, or '1f1b'"
            )
        key = _typed(key)
        loss, weight, grads = self.program(params, batch, self.table, key is not None)(params, batch, key)
        return loss / weight, jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)

    def loss(self, params: Tree, batch: Tree, key=None):
        """The mean loss of the batch: forward only, with no buffer that grows with the microbatches.

        Args:
            params: From `init` or `from_canonical`.
            batch: Leaves ``[B, ...]``.
            key: A `jax.random` key for dropout, or None for deterministic.
        """
        return self._loss(params, batch, _typed(key))

    @cached_property
    def _loss(self):
        def loss(params, batch, key):
            program = self.program(params, batch, self._forward_table, key is not None)
            total, weight, _ = program(params, batch, key)
            return total / weight

        return jax.jit(loss)

    @cached_property
    def _forward_table(self):
        s = self.schedule
        order = tuple(tuple(a for a in actions if a.phase == "F") for actions in s.order)
        return lower(Schedule("inference", s.devices, s.microbatches, s.repeats, s.placement, order))

    def optimizer(self, tx: optax.GradientTransformation) -> optax.GradientTransformation:
        """An optax transformation for the pipeline's tree that acts as `tx` on the model's separate layers.

        Masks and factored or per-tensor rules (weight decay by ndim, LAMB, Adafactor) see each layer's own leaf,
        without the leading device dim; norms over the whole tree see all layers.

        Args:
            tx: Any optax transformation or chain.
        """
        return logical_optimizer(tx, self.mesh)

    def to_canonical(self, params: Tree) -> Tree:
        """The canonical tree of pipeline parameters (or gradients), leaf by leaf on the devices."""
        return self.layout.to_canonical(params)

    def from_canonical(self, canonical: Tree) -> Tree:
        """The pipeline tree of canonical parameters, leaf by leaf on the devices.

        Raises:
            PartitionError: The tree has other kinds or another number of blocks than the model.
        """
        return self.layout.from_canonical(canonical)

    def _microbatch(self, batch: Tree) -> Tree:
        """Shapes of one row group."""
        leaves = jax.tree.leaves(batch)
        sizes = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
        if len(sizes) != 1 or None in sizes:
            raise ConfigError(
                f"batch leaves have leading sizes {sorted(map(str, sizes))} but must share one; try [B, …]"
            )
        rows, groups = sizes.pop(), self.schedule.microbatches * self.mesh.shape[DATA]
        if rows % groups or not rows:
            near = max(groups, round(rows / groups) * groups)
            raise ConfigError(
                f"batch size {rows} must be a multiple of microbatches={self.schedule.microbatches} * "
                f"data={self.mesh.shape[DATA]} = {groups}; try {near}"
            )
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows // groups, *x.shape[1:]), x.dtype), batch)

    def _carry(self, mb: Tree) -> Tree:
        """Shapes of what blocks pass on."""
        embed = self.model.embed
        return jax.eval_shape(
            lambda k, mb: embed.apply(embed.init(k, mb), mb, None), jax.eval_shape(lambda: jax.random.key(0)), mb
        )

    def sizes(self, batch: Tree) -> ModelBytes:
        """Bytes of the model's pieces per device, for `TickTable.bytes`.

        Args:
            batch: A batch, arrays or shapes, leaves ``[B, ...]``.
        """
        params = jax.eval_shape(self.init, jax.eval_shape(lambda: jax.random.key(0)), batch)
        return model_bytes(self.program(params, batch), params)

    def program(self, params: Tree, batch: Tree, table: TickTable | None = None, random: bool = False) -> Program:
        """What is fixed for parameters and batches of these shapes.

        Args:
            params: Arrays or shapes.
            batch: Arrays or shapes.
            table: The table to run, by default `table`.
            random: Whether there will be a key.
        """
        mb = self._microbatch(batch)
        params, key = _shapes(params), jax.eval_shape(lambda: jax.random.key(0))
        carry = jax.eval_shape(lambda p, mb: self.model.embed.apply(p, mb, None), params["embed"], mb)
        blocks = [
            jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), tree) for tree in params["blocks"][0]
        ]
        applies = [block.apply for block in self.model.blocks[: self.layout.per_stage]]
        for number, (apply, block) in enumerate(zip(applies, blocks, strict=True)):
            check_carry(number, carry, jax.eval_shape(apply, block, carry, mb, key))
        casts = [cast_dtypes(a, b, carry, mb, key) for a, b in zip(applies, blocks, strict=True)]
        context = Context(mb, key if random else None, jax.ShapeDtypeStruct((), jnp.int32))
        stage = Stage(applies, self.remat, _with_dtypes(blocks, casts), carry, context)
        ends = {"embed": params["embed"], "head": params["head"]}
        ends = Ends(self.model, self.schedule.devices, _with_dtypes(ends, self._end_dtypes(ends, carry, mb, key)))
        return Program(self.model, table or self.table, self.layout, self.mesh, stage, ends)

    def _end_dtypes(self, ends: Tree, carry: Tree, mb: Tree, key) -> Tree:
        """The dtypes that embedding and head compute with; a tied leaf keeps its own unless both agree."""
        model = self.model
        head = tie(ends["head"], ends["embed"], model.head_tie)
        embed = cast_dtypes(model.embed.apply, ends["embed"], mb, key)
        head = cast_dtypes(model.head_loss.apply, head, carry, mb, key)
        for to, source in model.head_tie.items():
            if get_path(head, to) != get_path(embed, source):
                embed = set_path(embed, source, get_path(ends["embed"], source).dtype)
        return {"embed": embed, "head": untie(head, model.head_tie)}


def check_split(blocks: int, devices: int, repeats: int) -> None:
    """Raises PartitionError unless the blocks divide evenly into devices * repeats stages."""
    stages = devices * repeats
    if blocks % stages:
        near = sorted({max(1, blocks // stages) * stages, -(-blocks // stages) * stages})
        raise PartitionError(
            f"num_layers={blocks} must be a multiple of devices={devices} * repeats={repeats} = {stages}; "
            f"try num_layers={' or '.join(map(str, near))}"
        )


def check_carry(number: int, carry: Tree, out: Tree) -> None:
    """Raises PartitionError unless a block returns the structure, shapes and dtypes that it was given."""
    if jax.tree.structure(carry) != jax.tree.structure(out):
        raise PartitionError(
            f"block {number} returns {jax.tree.structure(out)} but must return the structure of its input; "
            f"try {jax.tree.structure(carry)}"
        )
    for (path, a), b in zip(jax.tree.leaves_with_path(carry), jax.tree.leaves(out), strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise PartitionError(
                f"block {number} returns {b.dtype}{list(b.shape)} at carry{jax.tree_util.keystr(path)} but must return "
                f"what it was given; try {a.dtype}{list(a.shape)}"
            )


def _shapes(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _with_dtypes(shapes: Tree, dtypes: Tree) -> Tree:
    return jax.tree.map(lambda s, dtype: jax.ShapeDtypeStruct(s.shape, dtype), shapes, dtypes)


def _typed(key):
    """New-style key, so that its uses can be told from other integers."""
    if key is None or jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)
