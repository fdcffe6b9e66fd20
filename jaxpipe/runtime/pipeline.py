"""The door: checks what the user gives, fixes the program, delegates."""

import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.errors import ConfigError, ScheduleError
from jaxpipe.jax_internals import Tracer
from jaxpipe.runtime.contract import check_passed, explained, parts_of
from jaxpipe.runtime.layer.derivatives import with_gradient, without_derivative
from jaxpipe.runtime.layout.batch import check_names, warn_of_unread
from jaxpipe.runtime.layout.casts import end_dtypes
from jaxpipe.runtime.layout.inputs import batch_rows, check_canonical, check_parameters, some_key, typed_key
from jaxpipe.runtime.layout.logical import logical_optimizer
from jaxpipe.runtime.layout.mesh import BATCH, PIPE, TENSOR, batch_shards, batch_text, check_axes, on_cpu
from jaxpipe.runtime.layout.relayout import Layout, Shard
from jaxpipe.runtime.layout.tree import shapes_of, tie
from jaxpipe.runtime.loop.compile import Outcome, Program
from jaxpipe.runtime.loop.lane import PASSES_IN_PLACE, skip_of
from jaxpipe.runtime.measure.sizes import model_bytes
from jaxpipe.runtime.model import Losses, Model, Tree, check_model, losses_of
from jaxpipe.runtime.options import check_offload, check_tensor, stage_counts, stage_remats, vocab_leaves
from jaxpipe.runtime.stage.build import annotations, build_stages, check_kinds, check_params, one_of_each
from jaxpipe.runtime.stage.ends import Ends, check_weight, loss_dtype, metric_shapes
from jaxpipe.runtime.stage.initial import init_params
from jaxpipe.runtime.stage.stage import Context, Remat
from jaxpipe.schedule import Costs, ModelBytes, Schedule, TickTable, lower
from jaxpipe.schedule.costs import relative_costs
from jaxpipe.schedule.ir import check_schedule


class Pipeline:
    """A model on a mesh under a schedule: one XLA program per training step.

    Args:
        model: Embedding, blocks and head.
        schedule: Any schedule whose `devices` is the mesh's `pipe` size.
        mesh: From `make_mesh`.
        stages: Blocks per stage, in stage order: numbers, or Megatron's layout string (``"Et*3|(tt|)*2tL"``). By
            default the same number for all; ``"even"`` spreads any number of blocks as evenly as it goes. A stage may
            hold no block, only the embedding or only the head. A device's weights take the room of the largest stage
            of each repeat.
        remat: What a forward keeps for its backward. ``full``: only the stage's input; the backward runs the stage's
            forward again. ``none``: the outputs of matrix products, so that none is computed twice. ``all``: every
            residual. Or any policy of `jax.checkpoint`, applied to each block. Or a sequence of these, one per stage.
        scan_blocks: Compile one block of each kind and loop over it, instead of unrolling a stage's blocks: for deep
            stages, where compile time matters more. Not with schedules that split backwards.
        head: ``last``: the last stage computes the loss alone, with the gathered head. ``vocab_parallel``: embedding
            and head stay cut by vocabulary, and every device computes its slice of the logits of each microbatch that
            leaves the last stage, so that neither time nor memory piles up there; the model's ends must be a
            `VocabEmbed` and a `VocabHead` (the embedding may be another if nothing is tied to it).
        idle: ``skip``: idle lanes compute nothing. ``mask``: they compute and discard; see `jaxpipe.runtime.loop.lane`.
        offload: Keep what forwards leave for backwards in the host's memory, where the backend can (GPUs and TPUs): it
            takes room for one microbatch on the device, and the host's link carries it twice.
        packing: See `jaxpipe.schedule.lower`.
        memory: See `jaxpipe.schedule.lower`.
        costs: Relative times of the phases, for ``packing="auto"``; by default those of `remat` and `stages`.
        second_stream: On GPUs, give the second of the two hops that a lane starts on the placement ``v`` a stream of
            its own, so that both fly while the other lane computes. It rests on an undocumented hint to XLA, was read
            off compiled programs only. Where the mesh axis `tensor` is larger than 1 all hops take that stream, for
            what crosses `tensor` in a lane would make them wait otherwise; this is unverified on GPUs, and two
            collectives in flight on different streams may deadlock NCCL. Else without effect on the placement ``loop``,
            which has one hop per lane.
        shard: What lies cut over the mesh axis `fsdp`. ``params``: parameters, gradients and optimizer state; a step
            gathers the parameters once, before the loop. ``optimizer``: gradients and optimizer state only (ZeRO-1);
            parameters rest whole on each of its devices, and updates are gathered instead.

    Attributes:
        table: The tick table that runs.

    Raises:
        ConfigError: The mesh has another `pipe` size than the schedule, or an option has an unknown value.
        PartitionError: The blocks do not divide into stages.
        ScheduleError: The schedule does not verify or cannot be lowered.
    """

    def __init__(
        self,
        model: Model,
        *,
        schedule: Schedule,
        mesh: Mesh,
        stages: Sequence[int] | str | None = None,
        remat: Remat | Sequence[Remat] = "full",
        scan_blocks: bool = False,
        head: Literal["last", "vocab_parallel"] = "last",
        idle: Literal["skip", "mask"] = "skip",
        offload: bool = False,
        packing: Literal["auto", "paired", "single"] = "auto",
        memory: Literal["ideal", "strict"] = "ideal",
        costs: Costs | None = None,
        second_stream: bool = False,
        shard: Shard = "params",
    ):
        check_model(model)
        check_schedule(schedule)
        if idle not in ("skip", "mask"):
            raise ConfigError(f"idle={idle!r} must be 'skip' or 'mask'; try 'skip'")
        check_axes(mesh)
        if shard not in get_args(Shard):
            raise ConfigError(f"shard={shard!r} must be 'params' or 'optimizer'; try 'params'")
        if mesh.shape[PIPE] != schedule.devices:
            raise ConfigError(
                f"mesh.pipe={mesh.shape[PIPE]} must equal the schedule's devices={schedule.devices}; "
                f"try mesh.pipe={schedule.devices}"
            )
        if scan_blocks and schedule.phases & {"I", "W"}:
            raise ScheduleError(
                f"scan_blocks=True cannot split the backwards of schedule {schedule.name!r} into I and W; "
                "try scan_blocks=False, or '1f1b' or 'interleaved_1f1b'"
            )
        if second_stream and schedule.placement != "v" and mesh.shape.get(TENSOR, 1) == 1:
            warnings.warn(
                f"second_stream=True has no effect on placement={schedule.placement!r} of schedule {schedule.name!r}, "
                "whose lanes start one hop each; try second_stream=False",
                stacklevel=2,
            )
        check_kinds(model)
        check_tensor(model, mesh)
        self._cut = vocab_leaves(model, head)
        self.offload = offload and check_offload(mesh)
        counts = stage_counts(stages, len(model.blocks), schedule)
        self.model, self.schedule, self.mesh, self.idle = model, schedule, mesh, idle
        self.second_stream = second_stream
        self.remats = stage_remats(remat, schedule.stages)
        costs = costs or relative_costs(counts, self.remats, schedule)
        self.table = lower(schedule, packing, costs, memory, keeps=[kept != "full" for kept in self.remats])
        kinds, tensor = tuple(block.kind for block in model.blocks), annotations(model, self._cut)
        self._seen: set[Any] = set()
        self.layout = Layout(mesh, schedule, kinds, counts, scan_blocks, tensor, shard)

    @property
    def stages(self) -> tuple[int, ...]:
        """Blocks per stage, in stage order."""
        return self.layout.counts

    @property
    def batch_sharding(self) -> NamedSharding:
        """How a batch leaf ``[B, ...]`` rests: split over the axes `data` and `fsdp`, a copy on every stage."""
        return NamedSharding(self.mesh, PartitionSpec(BATCH))

    def init(self, key, batch: Tree) -> Tree:
        """Makes parameters, sharded on the mesh. The numbers do not depend on mesh or schedule.

        Args:
            key: A `jax.random` key.
            batch: Any batch, arrays or shapes, leaves ``[B, ...]``.

        Returns:
            The pipeline tree: ``{"embed", "blocks", "head"}``, see `jaxpipe.runtime.layout.relayout`.
        """
        key, mb = some_key(key), self._microbatch(batch)
        check_names(self.model, batch, whole=False)
        return init_params(self.model, self.layout, key, mb)

    def value_and_grad(
        self, params: Tree, batch: Tree, key=None, *, has_aux: bool = False, loss_scale: Any = None, parts: bool = False
    ) -> tuple[Any, Tree]:
        """The mean loss of the batch and its gradient, in one pass of the pipeline. Wrap it in `jax.jit`.

        Args:
            params: From `init` or `from_canonical`.
            batch: Leaves ``[B, ...]`` with B a multiple of microbatches times data times fsdp.
            key: A `jax.random` key for dropout, or None for deterministic.
            has_aux: Also return the head's metrics (see `HeadLoss`): ``((loss, metrics), grads)``.
            loss_scale: A number that backwards start from instead of 1, for half precision; gradients are divided by it
                when they have been added up in float32. Where the scale was too large they are not finite.
            parts: Return `jaxpipe.runtime.model.Losses`, what the loss is made of, in place of the loss.

        Returns:
            The loss (a float32 scalar, or float64 where the head's is) and a tree like `params` of float32 gradients.

        Raises:
            ConfigError: B does not divide, or this function is itself differentiated.
            PartitionError: Parameters of another pipeline, or a part of the model that breaks its contract.
            ScheduleError: The schedule has no backwards.
        """
        self._check(params, batch)
        return self._value_and_grad(params, batch, typed_key(key), _checked_scale(loss_scale), has_aux, parts)

    @cached_property
    def _value_and_grad(self):
        def run(params, batch, key, loss_scale, has_aux, parts):
            if not any(phase.backward for phase in self.table.phases):
                raise ScheduleError(
                    f"schedule={self.schedule.name!r} runs forwards only and has no gradient; try '1f1b', or "
                    "Pipeline.loss alone"
                )
            scale = 1.0 if loss_scale is None else loss_scale
            with self._explained(params, batch, trains=True):
                program = self.program(params, batch, self.table, key is not None, has_aux)
                out = without_derivative(program)(params, batch, key, scale)
            losses = self._losses(program, out)
            loss = losses if parts else losses.total
            divisor = out.weight if loss_scale is None else out.weight * scale
            # Where nothing counts the sums are zeros, and so is what is left. A choice by leaf would not be in place.
            divisor = jnp.where(divisor == 0, jnp.inf, divisor)
            grads = jax.tree.map(lambda g: g / divisor.astype(g.dtype), out.gradient)
            return ((loss, out.metrics) if has_aux else loss), grads

        # For calls outside jit: a shard_map that leaves an axis to the compiler cannot run without it. Within one, it
        # leaves no trace.
        return jax.jit(run, static_argnums=(4, 5), inline=True)

    def loss(self, params: Tree, batch: Tree, key=None, *, has_aux: bool = False, parts: bool = False) -> Any:
        """The mean loss of the batch: forward only, with no buffer that grows with the microbatches.

        It may be a part of a function that JAX differentiates with respect to the parameters, once: `jax.grad` of this
        loss plus a penalty runs what `value_and_grad` does, with the memory of the schedule. Gradients then have the
        dtypes of the parameters.

        Args:
            params: From `init` or `from_canonical`.
            batch: Leaves ``[B, ...]``.
            key: A `jax.random` key for dropout, or None for deterministic.
            has_aux: Also return the head's metrics: ``(loss, metrics)``. They have no derivative.
            parts: As in `value_and_grad`. Of these only `total` has a derivative.

        Raises:
            ConfigError: B does not divide, or a second derivative or one of batch or metrics is asked for.
            PartitionError: Parameters of another pipeline, or a part of the model that breaks its contract.
        """
        self._check(params, batch)
        return self._loss(params, batch, typed_key(key), has_aux, parts)

    @cached_property
    def _loss(self):
        def value(has_aux, params, batch, key):
            with self._explained(params, batch, trains=False):
                program = self.program(params, batch, self._forward_table, key is not None, has_aux)
                out = program(params, batch, key)
            losses = self._losses(program, out)
            return losses.total, (losses, out.metrics)

        def both(has_aux, params, batch, key):
            out, gradient = self.value_and_grad(params, batch, key, has_aux=has_aux, parts=True)
            losses, metrics = out if has_aux else (out, {})
            return (losses.total, (losses, metrics)), gradient

        def loss(params, batch, key, has_aux, parts):
            run = with_gradient(partial(value, has_aux), partial(both, has_aux))
            total, (losses, metrics) = run(params, batch, key)
            loss = losses._replace(total=total) if parts else total
            return (loss, metrics) if has_aux else loss

        return jax.jit(loss, static_argnums=(3, 4))

    def _explained(self, params: Tree, batch: Tree, trains: bool) -> AbstractContextManager:
        """`explained` for the functions of this model."""

        def parts():
            model, ends = self.model, shapes_of({part: params[part] for part in ("embed", "head")})
            carry = jax.eval_shape(lambda p, mb: model.embed.apply(p, mb, None), ends["embed"], mb)
            blocks = one_of_each(self.layout, shapes_of(params))
            blocks = {kind: tie(own, ends["embed"], model.block_tie(kind)) for kind, own in blocks.items()}
            head = tie(ends["head"], ends["embed"], model.head_tie)
            return parts_of(model, ends["embed"], blocks, head, carry)

        mb = self._microbatch(batch)
        return explained(parts, mb, trains)

    def _losses(self, program: Program, out: Outcome) -> Losses:
        return losses_of(self.model, out.loss, out.weight, out.aux, program.row_groups, program.stages.aux_blocks)

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
        return logical_optimizer(tx, self.mesh, self.layout)

    def to_canonical(self, params: Tree) -> Tree:
        """The canonical tree of pipeline parameters (or gradients), leaf by leaf on the devices."""
        check_parameters(self.layout, params)
        return self.layout.to_canonical(params)

    def from_canonical(self, canonical: Tree) -> Tree:
        """The pipeline tree of canonical parameters, leaf by leaf on the devices.

        Raises:
            PartitionError: The tree has other kinds or another number of blocks than the model.
        """
        check_canonical(Counter(self.layout.kinds), canonical)
        return self.layout.from_canonical(canonical)

    def _check(self, params: Tree, batch: Tree) -> None:
        """Raises for a call with anything but this pipeline's parameters and a batch of arrays."""
        check_parameters(self.layout, params)
        self._microbatch(batch)

    def _microbatch(self, batch: Tree) -> Tree:
        """Shapes of one row group."""
        rows = batch_rows(batch)
        groups = self.schedule.microbatches * batch_shards(self.mesh)
        if rows % groups or not rows:
            near = max(groups, round(rows / groups) * groups)
            raise ConfigError(
                f"batch size {rows} must be a multiple of microbatches={self.schedule.microbatches} * "
                f"{batch_text(self.mesh)} = {groups}; try {near}"
            )
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows // groups, *x.shape[1:]), x.dtype), shapes_of(batch))

    def sizes(self, batch: Tree) -> ModelBytes:
        """Bytes of the model's pieces per device, for `TickTable.bytes`.

        Args:
            batch: A batch, arrays or shapes, leaves ``[B, ...]``.
        """
        params = jax.eval_shape(self.init, jax.eval_shape(lambda: jax.random.key(0)), batch)
        return model_bytes(self.program(params, batch), params)

    def program(
        self, params: Tree, batch: Tree, table: TickTable | None = None, random: bool = False, metrics: bool = False
    ) -> Program:
        """What is fixed for parameters and batches of these shapes.

        Args:
            params: Arrays or shapes.
            batch: Arrays or shapes.
            table: The table to run, by default `table`.
            random: Whether there will be a key.
            metrics: Whether the head's metrics are wanted.
        """
        check_names(self.model, batch)
        # What is traced here may depend on the kind of device, as in the loop: attention does.
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return self._program(shapes_of(params), self._microbatch(batch), table or self.table, random, metrics)

    def _program(self, params: Tree, mb: Tree, table: TickTable, random: bool, metrics: bool) -> Program:
        model, key = self.model, jax.eval_shape(lambda: jax.random.key(0))
        check_params(params)
        carry = jax.eval_shape(lambda p, mb: model.embed.apply(p, mb, None), params["embed"], mb)
        check_passed(carry)
        context = Context(mb, key if random else None, jax.ShapeDtypeStruct((), jnp.int32))
        stages = build_stages(model, self.layout, self.remats, params, carry, context, walls=on_cpu(self.mesh))
        ends = {"embed": params["embed"], "head": params["head"]}
        ends = _with_dtypes(ends, end_dtypes(model, ends, carry, mb, key))
        ends = Ends(model, self.schedule.devices, ends, self.layout.rests(ends), self.layout.shard, self._cut)
        head = jax.eval_shape(ends.head, dict(ends.shapes))
        if stages.stage.aux:
            check_weight(model, head, carry, mb)
        skip = "mask" if self.idle == "mask" else skip_of(self.mesh, stages, self.offload)
        program = Program(
            model=model,
            table=table,
            layout=self.layout,
            mesh=self.mesh,
            stages=stages,
            ends=ends,
            skip=skip,
            hops_block=on_cpu(self.mesh),
            metrics=metric_shapes(model, head, carry, mb) if metrics else {},
            loss_dtype=loss_dtype(model, head, carry, mb, context.group),
            offload=self.offload,
            second_stream=self.second_stream,
            ends_inside=skip == "branch" and PASSES_IN_PLACE,
        )
        self._warn_of_unread(params, carry, mb, key)
        return program

    def _warn_of_unread(self, params: Tree, carry: Tree, mb: Tree, key: Any) -> None:
        """Once for batches of a form."""
        form = jax.tree.structure(mb)
        if not self.model.batch and form not in self._seen:
            self._seen.add(form)
            warn_of_unread(self.model, {**params, "blocks": one_of_each(self.layout, params)}, carry, mb, key)


def _with_dtypes(shapes: Tree, dtypes: Tree) -> Tree:
    return jax.tree.map(lambda s, dtype: jax.ShapeDtypeStruct(s.shape, dtype), shapes, dtypes)


def _checked_scale(loss_scale: Any) -> Any:
    """The loss scale.

    Raises:
        ConfigError: It is no number, or 0.
    """
    if loss_scale is None or isinstance(loss_scale, Tracer):
        return loss_scale
    if jnp.shape(loss_scale) or not isinstance(loss_scale, int | float | jax.Array | np.generic | np.ndarray):
        raise ConfigError(f"loss_scale={loss_scale!r} must be a number or None; try 2.0**15")
    return loss_scale
