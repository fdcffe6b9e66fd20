"""The two loops of `jaxpipe.runtime.layer.sweeps`, forwards and backwards, for arrays of given shapes.

Both run the lanes of `Pipeline` over one tick table. The blocks become a model whose embedding hands over a microbatch
of the input and which has no head: outputs are collected in slots, gradients start from slots that the caller fills.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxpipe.runtime.layout.collect import add_up
from jaxpipe.runtime.layout.mesh import BATCH, MANUAL, PIPE, batch_shards, manual_axes, on_cpu
from jaxpipe.runtime.layout.relayout import Layout
from jaxpipe.runtime.loop import slots
from jaxpipe.runtime.loop.compile import Program
from jaxpipe.runtime.loop.device import Device, zero
from jaxpipe.runtime.loop.lane import skip_of
from jaxpipe.runtime.loop.stage_lanes import backward_kinds, backward_lane, forward_lane, weight_lane
from jaxpipe.runtime.loop.tick import block_sums, hops, sides
from jaxpipe.runtime.model import Block, Embed, HeadLoss, Model, Tree
from jaxpipe.runtime.stage.build import build_stages
from jaxpipe.runtime.stage.carry import join, part
from jaxpipe.runtime.stage.ends import Ends, accumulator_dtype
from jaxpipe.runtime.stage.stage import Context, Remat
from jaxpipe.schedule import Schedule, TickTable

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


def make_loops(
    apply: BlockCall,
    table: TickTable,
    layout: Layout,
    remats: Sequence[Remat],
    given: dict,
    resting: Tree,
    random: bool,
) -> "Loops":
    """What is fixed for arrays of these shapes.

    Args:
        apply: What one block computes.
        table: The tick table.
        layout: Where the blocks live.
        remats: What each stage keeps, in stage order.
        given: Shapes of what has gradients: ``{"params", "x", "riding", "shared"}``.
        resting: Shapes of the rest.
        random: Whether there will be a key.

    Raises:
        PartitionError: A block does not return what it was given.
    """
    schedule, mesh = layout.schedule, layout.mesh
    model = _model(apply, len(layout.kinds), given["shared"])
    row_groups = schedule.microbatches * batch_shards(mesh)

    def group(tree: Tree) -> Tree:
        rows = jax.tree.leaves(given["x"])[0].shape[0] // row_groups
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct((rows, *s.shape[1:]), s.dtype), tree)

    floating, others = part(given["shared"])
    carry = group([given["x"], given["riding"]])
    mb = {"resting": group(resting), "number": jax.ShapeDtypeStruct((), jnp.int32), "others": others}
    embed = {"shared": {str(n): s for n, s in enumerate(floating)}}
    params = {"blocks": jax.eval_shape(lambda params: _relaid(layout, params), given["params"]), "embed": embed}
    a_key = jax.eval_shape(lambda: jax.random.key(0)) if random else None
    context = Context(mb, a_key, jax.ShapeDtypeStruct((), jnp.int32))
    stages = build_stages(model, layout, remats, params, carry, context, walls=on_cpu(mesh))
    program = Program(
        model=model,
        table=table,
        layout=layout,
        mesh=mesh,
        stages=stages,
        ends=Ends(model, schedule.devices, {"embed": embed, "head": {}}, {"embed": {}, "head": {}}),
        skip=skip_of(mesh, stages),
        hops_block=on_cpu(mesh),
    )
    return Loops(program)


def _model(call: BlockCall, num_layers: int, shared: Tree) -> Model:
    """The blocks as a model whose embedding hands over `x`, and which has no head."""

    def apply(params, carry, mb, key):
        x, riding = carry
        whole = [params["shared"][str(n)] for n in range(num_floating)]
        known = Inputs(riding, mb["resting"], join(shared, whole, mb["others"]))
        return [call(params["own"], x, known, key), riding]

    num_floating = len(part(shared)[0])
    ties = {f"blocks/{KIND}/shared/{n}": f"embed/shared/{n}" for n in range(num_floating)}
    block = Block(init=lambda key, carry: {}, apply=apply, kind=KIND)

    def embed(params, mb, key):
        return jax.tree.map(lambda leaf: leaf[mb["number"]], params["carry"])

    return Model(
        embed=Embed(init=lambda key, mb: {}, apply=embed),
        blocks=[block] * num_layers,
        head_loss=HeadLoss(init=lambda *_: {}, apply=lambda *_: (jnp.zeros(()), jnp.zeros(()))),
        tie=ties,
    )


def _relaid(layout: Layout, params: Tree) -> list:
    """The blocks' parameters ``[num_layers, ...]`` in the layout of the loop."""
    whole = {"embed": {}, "head": {}, "blocks": {KIND: {"own": params}}}
    return layout.from_canonical(whole)["blocks"]


@dataclass(frozen=True)
class Loops:
    """Both loops.

    Attributes:
        program: What is fixed.
    """

    program: Program

    @cached_property
    def forward(self) -> Callable[[dict, Tree, Any], tuple[Tree, dict]]:
        """``(given, resting, key) -> (output, stash)``.

        The stash is empty for a table without backwards; leaves ``[P, shards, slots, ...]``.
        """
        stashed = ("activation", "residual") if self.program.trains else ()
        out_specs = PartitionSpec(BATCH), dict.fromkeys(stashed, PartitionSpec(PIPE, BATCH))
        # jit, for a shard_map that leaves axes to the compiler cannot run without.
        return jax.jit(
            lambda given, resting, key: self._on_devices(self._forward, given, resting, key, {}, [], out_specs)
        )

    @cached_property
    def backward(self) -> Callable[[dict, Tree, Any, dict, list], list]:
        """``(given, resting, key, stash, dy) -> gradients``, those of the floating-point leaves of `given`, in order.

        `dy` is the gradient of the output's floating-point leaves.
        """
        out_specs = self._rest, PartitionSpec(BATCH), PartitionSpec()

        def run(given: dict, resting: Tree, key, stash: dict, dy: list) -> list:
            out = self._on_devices(self._backward, given, resting, key, stash, dy, out_specs)
            blocks, carry, shared = out
            canonical = self.program.layout.to_canonical({"embed": {}, "head": {}, "blocks": blocks})["blocks"]
            split_at = len(part(given["x"])[0])
            # In the order of the leaves of `given`: params, riding, shared, x.
            return [
                *jax.tree.leaves(canonical[KIND]["own"]),
                *carry[split_at:],
                *(shared[str(n)] for n in range(len(shared))),
                *carry[:split_at],
            ]

        return jax.jit(run)

    @property
    def _rest(self) -> Tree:
        """How weights and their gradients rest."""
        return jax.tree.map(lambda rest: rest.spec(MANUAL), self.program.rests)

    @property
    def _microbatches(self) -> int:
        return self.program.table.schedule.microbatches

    def _forward(self, device: Device, columns: dict, stash: dict, dy: list) -> tuple[Tree, dict]:
        """The output, and what backwards need: leaves ``[1, 1, slots, ...]``."""
        table, stages = device.table, device.stages
        carry, counts = stages.stage.carry, table.slots
        state = {
            "y": jax.tree.map(zero, carry),
            "out": device.slots(carry[0], self._microbatches),
            "activation": device.stash(carry, counts.activation),
        }
        if device.trains:
            shapes = list(stages.residuals.shapes)
            state["residual"] = device.stash(shapes, counts.residual, not device.branches_commit)

        def tick(state, row, phase):
            arrived = hops(device, state["y"], sides(device, "f", phase.start, phase.stop))
            state, y, commit = forward_lane(device, state, row, arrived)
            at = jnp.where(row["h_gradient"] >= 0, row["f_microbatch"], -1)
            return commit(state) | {"y": y, "out": slots.put(state["out"], at, y[0])}

        state = _loop(table, columns, state, tick, backwards=False)
        stashed = ("activation", "residual") if device.trains else ()
        stash = jax.tree.map(lambda leaf: leaf[None, None], {name: state[name] for name in stashed})
        return _whole_batch(state["out"], device.simulated), stash

    def _backward(self, device: Device, columns: dict, stash: dict, dy: list) -> tuple[list, list, dict]:
        """Gradients of the blocks, the carry's floating-point leaves and what is shared."""
        table, gradient = device.table, device.stages.stage.gradient
        first, last = (_owns(table.schedule, stage) for stage in (0, table.schedule.stages - 1))

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

        state = _loop(table, columns, self._start_backward(device, stash), tick, backwards=True)
        shared = jax.tree.map(lambda leaf: add_up(leaf, MANUAL, device.simulated), state["ends"]["embed"]["shared"])
        return (
            self.program.block_gradients(device, state["blocks"]),
            _whole_batch(state["out"], device.simulated),
            shared,
        )

    def _start_backward(self, device: Device, stash: dict) -> dict:
        """The state before the first tick of the backward loop."""
        table, stages, counts = device.table, device.stages, device.table.slots
        gradient, shared = stages.stage.gradient, device.ends["embed"]["shared"]
        sums = {name: jnp.zeros(x.shape, accumulator_dtype(x.dtype)) for name, x in shared.items()}
        state = jax.tree.map(lambda leaf: leaf[0, 0], stash)
        state |= {
            "dx": [zero(s) for s in gradient],
            "out": device.slots(gradient, self._microbatches),
            "blocks": block_sums(device),
            "ends": {"embed": {"shared": sums}},
        }
        if not table.gradient_direct:
            state["gradient"] = device.slots(gradient, counts.gradient)
        if backward_kinds(table)[1]:
            shapes = list(stages.weight_residuals.shapes)
            state["weight_residual"] = device.stash(shapes, counts.weight_residual, not device.branches_commit)
        return state

    def _on_devices(self, run: Callable, given: dict, resting: Tree, key, stash: dict, dy: list, out_specs: Any) -> Any:
        """Runs ``run(device, columns, stash, dy)`` on all devices; dy is ``[M, rows, ...]`` there."""
        program, mesh = self.program, self.program.mesh
        everywhere, rows = PartitionSpec(), PartitionSpec(BATCH)
        columns = {name: jnp.asarray(numbers, jnp.int32) for name, numbers in program.table.columns.items()}
        shared_floating, shared_others = part(given["shared"])

        def cut(tree):
            return jax.tree.map(lambda leaf: leaf.reshape(self._microbatches, -1, *leaf.shape[1:]), tree)

        def body(place, shard, columns, blocks, carry, resting, shared, others, key, dy, stash):
            batch = {
                "resting": cut(resting),
                "number": jnp.arange(self._microbatches, dtype=jnp.int32),
                "others": [jnp.broadcast_to(x, (self._microbatches, *x.shape)) for x in others],
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

        specs_and_values = [
            (PartitionSpec(None, PIPE), columns),
            (self._rest, _relaid(program.layout, given["params"])),
            (rows, [given["x"], given["riding"]]),
            (rows, resting),
            (everywhere, shared_floating),
            (everywhere, shared_others),
            (everywhere, key),
            (rows, dy),
            (PartitionSpec(PIPE, BATCH), stash),
        ]
        specs, values = zip(*specs_and_values, strict=True)
        places = [jnp.arange(count, dtype=jnp.int32) for count in (mesh.shape[PIPE], batch_shards(mesh))]
        mapped: Any = jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(PartitionSpec(PIPE), rows, *specs),
            out_specs=out_specs,
            axis_names=manual_axes(mesh),
            check_vma=False,
        )
        return mapped(*places, *values)


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


def _whole_batch(slots: Tree, simulated: bool) -> Tree:
    """Slots ``[M + 1, rows, ...]`` that one device of the pipe filled and the others left zero, as ``[B, ...]``."""

    def join_rows(leaf):
        rows = leaf[:-1].reshape(-1, *leaf.shape[2:])
        return add_up(rows, PIPE, simulated)

    return jax.tree.map(join_rows, slots)
