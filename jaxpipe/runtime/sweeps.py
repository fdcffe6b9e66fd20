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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxpipe.errors import ConfigError
from jaxpipe.runtime import keys, slots
from jaxpipe.runtime.build import build_stages, check_carry
from jaxpipe.runtime.carry import join, part
from jaxpipe.runtime.compile import Program
from jaxpipe.runtime.device import Device
from jaxpipe.runtime.ends import Ends, accumulator_dtype
from jaxpipe.runtime.mesh import BATCH, MANUAL, PIPE, batch_shards, batch_text, check_axes
from jaxpipe.runtime.model import Block, Embed, HeadLoss, Model, Tree
from jaxpipe.runtime.options import stage_counts, stage_remats
from jaxpipe.runtime.relayout import Layout
from jaxpipe.runtime.stage import Context, Remat
from jaxpipe.runtime.stage_lanes import backward_kinds, backward_lane, forward_lane, weight_lane
from jaxpipe.runtime.tick import block_sums, hops, sides, zero
from jaxpipe.schedule import Schedule, TickTable, lower
from jaxpipe.schedule.lower import lower_sweeps

KIND = "block"

BlockCall = Callable[[Tree, Tree, "Inputs", Any], Tree]
"""``(params, x, inputs, key) -> x``."""


@dataclass(frozen=True)
class Inputs:
    """What a block reads beside its parameters and `x`: three trees, see the module."""

    riding: Tree
    resting: Tree
    shared: Tree


jax.tree_util.register_dataclass(Inputs)


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
        rows = jax.tree.leaves(x)[0].shape[0]
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
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)

        @jax.custom_vjp
        def call(floating, others, resting, key):
            return self._sweep(self.forward_table, join(like, floating, others), resting, key)[0]

        def forward(floating, others, resting, key):
            y, stash = self._sweep(self.table, join(like, floating, others), resting, key)
            return y, (floating, others, resting, key, stash)

        def backward(known, dy):
            floating, others, resting, key, stash = known
            gradients = self._sweep_back(join(like, floating, others), resting, key, stash, part(dy)[0])
            cast = [g.astype(leaf.dtype) for g, leaf in zip(gradients, floating, strict=True)]
            return cast, None, None, None

        call.defvjp(forward, backward)
        return call(*part(given), resting, key)

    def _model(self, shared: Tree) -> Model:
        """The blocks as a model whose embedding hands over `x`, and which has no head."""

        def apply(params, carry, mb, key):
            x, riding = carry
            whole = [params["shared"][str(n)] for n in range(num_floating)]
            known = Inputs(riding, mb["resting"], join(like, whole, mb["others"]))
            return [self.apply(params["own"], x, known, key), riding]

        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shared)
        num_floating = len(part(shared)[0])
        ties = {f"blocks/{KIND}/shared/{n}": f"embed/shared/{n}" for n in range(num_floating)}
        block = Block(init=lambda key, carry: {}, apply=apply, kind=KIND)

        def embed(params, mb, key):
            return jax.tree.map(lambda leaf: leaf[mb["number"]], params["carry"])

        return Model(
            embed=Embed(init=lambda key, mb: {}, apply=embed),
            blocks=[block] * self.num_layers,
            head_loss=HeadLoss(init=lambda *_: {}, apply=lambda *_: (jnp.zeros(()), jnp.zeros(()))),
            tie=ties,
        )

    def _program(self, table: TickTable, given: dict, resting: Tree, key) -> Program:
        """What is fixed for arrays of these shapes."""
        model = self._model(given["shared"])
        given, resting = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (given, resting))

        def group(tree: Tree) -> Tree:
            rows = jax.tree.leaves(given["x"])[0].shape[0] // self.row_groups
            return jax.tree.map(lambda s: jax.ShapeDtypeStruct((rows, *s.shape[1:]), s.dtype), tree)

        floating, others = part(given["shared"])
        carry = group([given["x"], given["riding"]])
        mb = {"resting": group(resting), "number": jax.ShapeDtypeStruct((), jnp.int32), "others": others}
        embed = {"shared": {str(n): s for n, s in enumerate(floating)}}
        params = jax.eval_shape(self._relaid, given["params"])
        a_key = None if key is None else jax.eval_shape(lambda: jax.random.key(0))
        context = Context(mb, a_key, jax.ShapeDtypeStruct((), jnp.int32))
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        return Program(
            model=model,
            table=table,
            layout=self.layout,
            mesh=self.mesh,
            stages=build_stages(
                model, self.layout, self.remats, {"blocks": params, "embed": embed}, carry, context, walls=on_cpu
            ),
            ends=Ends(model, self.schedule.devices, {"embed": embed, "head": {}}, {"embed": {}, "head": {}}),
            skip="loop" if on_cpu else "branch",
            hops_block=on_cpu,
        )

    def _relaid(self, params: Tree) -> list:
        """The blocks' parameters ``[num_layers, ...]`` in the layout of the loop."""
        whole = {"embed": {}, "head": {}, "blocks": {KIND: {"own": params}}}
        return self.layout.from_canonical(whole)["blocks"]

    def _sweep(self, table: TickTable, given: dict, resting: Tree, key) -> tuple[Tree, dict]:
        """The output and, where `table` has backwards, what they need: leaves ``[P, shards, slots, ...]``."""
        program = self._program(table, given, resting, key)
        stash_names = ("activation", "residual") if program.trains else ()

        def run(device: Device, columns: dict, *_):
            stages, counts = program.stages, table.slots
            carry = stages.stage.carry
            state = {
                "y": jax.tree.map(zero, carry),
                "out": device.slots(carry[0], self.schedule.microbatches),
                "activation": device.stash(carry, counts.activation),
            }
            if program.trains:
                scratch = device.skip != "loop" or not all(table.keeps)
                state["residual"] = device.stash(list(stages.residuals.shapes), counts.residual, scratch)

            def tick(state, row, phase):
                arrived = hops(device, state["y"], sides(device, "f", phase.start, phase.stop))
                state, y, commit = forward_lane(device, state, row, arrived)
                at = jnp.where(row["h_gradient"] >= 0, row["f_microbatch"], -1)
                return commit(state) | {"y": y, "out": slots.put(state["out"], at, y[0])}

            state = _loop(table, columns, state, tick, backwards=False)
            stash = jax.tree.map(lambda leaf: leaf[None, None], {name: state[name] for name in stash_names})
            return _whole_batch(state["out"]), stash

        stash_specs = dict.fromkeys(stash_names, PartitionSpec(PIPE, BATCH))
        return self._on_devices(program, run, given, resting, key, [], {}, (PartitionSpec(BATCH), stash_specs))

    def _sweep_back(self, given: dict, resting: Tree, key, stash: dict, dy: list) -> list:
        """The gradients of the floating-point leaves of `given`."""
        table = self.table
        program = self._program(table, given, resting, key)
        num_riding = len(part(given["riding"])[0])

        def run(device: Device, columns: dict, stash: dict, dy: list):
            stages, counts = program.stages, table.slots
            gradient = stages.stage.gradient
            full, split = backward_kinds(table)
            shared = device.ends["embed"]["shared"]
            state = jax.tree.map(lambda leaf: leaf[0, 0], stash)
            state |= {
                "dx": [zero(s) for s in gradient],
                "out": device.slots(gradient, self.schedule.microbatches),
                "blocks": block_sums(device),
                "ends": {
                    "embed": {"shared": {n: jnp.zeros(x.shape, accumulator_dtype(x.dtype)) for n, x in shared.items()}}
                },
            }
            if not table.gradient_direct:
                state["gradient"] = device.slots(gradient, counts.gradient)
            if split:
                scratch = device.skip != "loop" or full
                state["weight_residual"] = device.stash(
                    list(stages.weight_residuals.shapes), counts.weight_residual, scratch
                )
            schedule = self.schedule
            first, last = (_owns(schedule, stage) for stage in (0, schedule.stages - 1))

            def tick(state, row, phase):
                if phase.backward:
                    arrived = hops(device, state["dx"], sides(device, "b", phase.start, phase.stop))
                    microbatch = jnp.maximum(row["b_microbatch"], 0)
                    own = [lax.dynamic_index_in_dim(leaf, microbatch, keepdims=False) for leaf in dy]
                    own += [zero(s) for s in gradient[len(own) :]]
                    if "gradient" in state:
                        at = jnp.where(last(device, row), row["b_gradient"], -1)
                        state = state | {"gradient": slots.put(state["gradient"], at, own)}
                    state, dx, commit = backward_lane(device, state, row, arrived, own)
                    at = jnp.where(first(device, row), row["b_microbatch"], -1)
                    state = commit(state) | {"dx": dx, "out": slots.put(state["out"], at, dx)}
                return weight_lane(device, state, row) if phase.weight else state

            state = _loop(table, columns, state, tick, backwards=True)
            shared = jax.tree.map(lambda leaf: lax.psum(leaf, MANUAL), state["ends"]["embed"]["shared"])
            return program.block_gradients(state["blocks"]), _whole_batch(state["out"]), shared

        weights = jax.tree.map(lambda rest: rest.spec(MANUAL), program.rests)
        specs = weights, PartitionSpec(BATCH), PartitionSpec()
        blocks, carry, shared = self._on_devices(program, run, given, resting, key, dy, stash, specs)
        canonical = self.layout.to_canonical({"embed": {}, "head": {}, "blocks": blocks})["blocks"][KIND]["own"]
        split_at = len(carry) - num_riding
        # [1] In the order of the leaves of `given`: params, riding, shared, x.
        return [
            *jax.tree.leaves(canonical),
            *carry[split_at:],
            *(shared[str(n)] for n in range(len(shared))),
            *carry[:split_at],
        ]

    def _on_devices(
        self, program: Program, run: Callable, given: dict, resting: Tree, key, dy: list, stash: dict, out_specs: Any
    ) -> Any:
        """Runs ``run(device, columns, stash, dy)`` on all devices; dy is ``[M, rows, ...]`` there."""
        microbatches = self.schedule.microbatches
        everywhere, rows, stacked = PartitionSpec(), PartitionSpec(BATCH), PartitionSpec(PIPE)
        columns = {name: jnp.asarray(numbers, jnp.int32) for name, numbers in program.table.columns.items()}
        shared_floating, shared_others = part(given["shared"])

        def body(place, shard, columns, blocks, carry, resting, shared, others, key, dy, stash):
            def cut(tree):
                return jax.tree.map(lambda leaf: leaf.reshape(microbatches, -1, *leaf.shape[1:]), tree)

            batch = {
                "resting": cut(resting),
                "number": jnp.arange(microbatches, dtype=jnp.int32),
                "others": [jnp.broadcast_to(x, (microbatches, *x.shape)) for x in others],
            }
            device = program.device(
                place=place[0],
                shard=shard[0],
                batch=batch,
                key=key,
                blocks=program.weights(blocks),
                ends={"embed": {"shared": {str(n): x for n, x in enumerate(shared)}, "carry": cut(carry)}, "head": {}},
                seeds=(jnp.ones(()), jnp.zeros(())),
            )
            return run(device, {name: column[:, 0] for name, column in columns.items()}, stash, cut(dy))

        places = [jnp.arange(n, dtype=jnp.int32) for n in (self.mesh.shape[PIPE], batch_shards(self.mesh))]
        mapped: Any = jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=(
                stacked,
                rows,
                PartitionSpec(None, PIPE),
                jax.tree.map(lambda rest: rest.spec(MANUAL), program.rests),
                rows,
                rows,
                everywhere,
                everywhere,
                everywhere,
                rows,
                PartitionSpec(PIPE, BATCH),
            ),
            out_specs=out_specs,
            axis_names=set(MANUAL),
            check_vma=False,
        )
        blocks, carry = self._relaid(given["params"]), [given["x"], given["riding"]]
        # jit, for a shard_map that leaves axes to the compiler cannot run without.
        known = blocks, carry, resting, shared_floating, shared_others, key, dy, stash
        return jax.jit(mapped)(*places, columns, *known)


def _loop(table: TickTable, columns: dict, state: dict, tick: Callable, backwards: bool) -> dict:
    """Runs the ticks of one sweep."""
    for phase in table.phases:
        if phase.forward != backwards:
            rows = {name: column[phase.start : phase.stop] for name, column in columns.items()}
            state, _ = lax.scan(lambda s, row, phase=phase: (tick(s, row, phase), None), state, rows)
    return state


def _owns(schedule: Schedule, stage: int) -> Callable[[Device, dict], Any]:
    """Whether a device runs the backward of a stage in a row of the table."""
    where, repeat = schedule.device_of(stage), schedule.repeat_of(stage)
    return lambda device, row: (device.place == where) & (row["b_repeat"] == repeat)


def _whole_batch(slots: Tree) -> Tree:
    """Slots ``[M + 1, rows, ...]`` that one device of the pipe filled and the others left zero, as ``[B, ...]``."""

    def join_rows(leaf):
        rows = leaf[:-1].reshape(-1, *leaf.shape[2:])
        # XLA for CPUs cannot add up half precision over devices, and none can add up truth values.
        wide = jnp.int32 if rows.dtype == jnp.bool_ else jnp.promote_types(rows.dtype, jnp.float32)
        floating = jnp.issubdtype(rows.dtype, jnp.inexact)
        return lax.psum(rows.astype(wide) if floating or rows.dtype == jnp.bool_ else rows, PIPE).astype(rows.dtype)

    return jax.tree.map(join_rows, slots)
