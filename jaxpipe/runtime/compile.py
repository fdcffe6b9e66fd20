"""From tick tables to one program: the loop that every device runs over its own column of the table.

One `shard_map`, manual over `pipe` and `data`; inside it one `lax.scan` per phase of the table. The tick:

    rb = hop(dx)            [1] the last backward lane's gradient flies ...
    y  = F lane             ... while the forward lane computes
    fence(rb, y)
    rf = hop(y)             [2] the forward lane's output flies ...
    dy = head, dx = B lane  ... while head and backward lane compute
    fence(rf, dx)

What a lane makes besides passes its fence too. Otherwise the scheduler hides the hop behind the small updates that come
after the lane and starts it when the lane is done.

Idle lanes skip. Buffers and accumulators are updated outside the conditionals: updated inside, XLA copies them whole,
in the branch that does nothing too. An idle lane writes a scratch slot.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxpipe.runtime import keys
from jaxpipe.runtime.ends import Ends, accumulate, accumulator_dtype
from jaxpipe.runtime.mesh import DATA, PIPE
from jaxpipe.runtime.model import Model, Tree
from jaxpipe.runtime.relayout import Layout
from jaxpipe.runtime.stage import Context, Stage
from jaxpipe.runtime.transfer import fence, hop
from jaxpipe.schedule import TickTable
from jaxpipe.schedule.lower import Phase


@dataclass(frozen=True)
class Program:
    """Everything that is fixed when the loop is traced.

    Attributes:
        model: The model.
        table: The tick table.
        layout: Where the blocks live.
        mesh: The mesh.
        stage: The lanes of a stage.
        ends: Embedding and head.
    """

    model: Model
    table: TickTable
    layout: Layout
    mesh: Mesh
    stage: Stage
    ends: Ends

    def __call__(self, params: Tree, batch: Tree, key: Any, loop: Callable | None = None) -> tuple[Any, Any, Tree]:
        """Runs the whole microbatch loop.

        Args:
            params: Pipeline parameters.
            batch: Leaves ``[B, ...]``.
            key: A key or None.
            loop: ``(lanes, state) -> state`` in place of the table's loop, for measurements.

        Returns:
            ``(loss_sum, weight, grads)``: global sums, and the gradient of `loss_sum` (None if the table has no
            backwards).
        """
        specs = self.layout.specs(params)
        columns = {name: jnp.asarray(rows, jnp.int32) for name, rows in self.table.columns.items()}
        trains = any(phase.backward for phase in self.table.phases)
        body: Any = jax.shard_map(
            partial(self._device, loop),
            mesh=self.mesh,
            in_specs=(
                PartitionSpec(PIPE),
                PartitionSpec(DATA),
                PartitionSpec(None, PIPE),
                specs,
                PartitionSpec(DATA),
                PartitionSpec(),
            ),
            out_specs=(PartitionSpec(), PartitionSpec(), specs if trains else None),
            axis_names={PIPE, DATA},
            check_vma=False,
        )
        places = (jnp.arange(self.mesh.shape[axis], dtype=jnp.int32) for axis in (PIPE, DATA))
        return body(*places, columns, params, batch, key)

    def _device(self, loop, device, shard, columns: dict, params: Tree, batch: Tree, key):
        """What one device does. Local shapes: device [1], shard [1], columns [ticks, 1], batch [B / data, ...]."""
        columns = {name: column[:, 0] for name, column in columns.items()}
        batch = jax.tree.map(lambda x: x.reshape(self.table.schedule.microbatches, -1, *x.shape[1:]), batch)
        lanes = Lanes(self, device[0], shard[0], batch, key, *self._weights(params))
        state = lanes.start(params)
        if loop is not None:
            state = loop(lanes, state)
        for phase in self.table.phases if loop is None else ():
            rows = {name: column[phase.start : phase.stop] for name, column in columns.items()}
            state, _ = lax.scan(lambda s, row, phase=phase: (lanes.tick(s, row, phase), None), state, rows)
        axes = (PIPE, DATA)
        loss, weight = lax.psum(state["loss"], axes), lax.psum(state["weight"], axes)
        return loss, weight, self._reduce(state) if "blocks" in state else None

    def _weights(self, params: Tree) -> tuple[list, Tree]:
        """The stages' weights of this device and the gathered ends, in the dtypes that the lanes compute with."""
        blocks = [
            [
                jax.tree.map(lambda x, s: x[0].astype(s.dtype), tree, shapes)
                for tree, shapes in zip(stage, self.stage.params, strict=True)
            ]
            for stage in params["blocks"]
        ]
        return blocks, self.ends.gather({"embed": params["embed"], "head": params["head"]})

    def _reduce(self, state: dict) -> Tree:
        """Local accumulators to gradients: the one reduction per step."""
        repeats = self.table.schedule.repeats
        blocks = [
            jax.tree.map(lambda acc, c=c: lax.psum(acc[None] if repeats == 1 else acc[c][None], DATA), state["blocks"])
            for c in range(repeats)
        ]
        ends = self.ends.reduce(state["ends"])
        return {**ends, "blocks": blocks}


@dataclass(frozen=True)
class Lanes:
    """The lanes of one device.

    Attributes:
        program: What is fixed.
        device: This device's place, int32.
        shard: This device's data shard, int32.
        batch: Leaves ``[M, rows, ...]``.
        key: A key or None.
        blocks: Weights, ``blocks[repeat][j]``.
        ends: Gathered embedding and head parameters.
    """

    program: Program
    device: Any
    shard: Any
    batch: Tree
    key: Any
    blocks: list
    ends: Tree

    def start(self, params: Tree) -> dict:
        """The loop's state before the first tick."""
        program, table = self.program, self.program.table
        stage, schedule = program.stage, program.table.schedule
        carry = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), stage.carry)
        dtype = accumulator_dtype(jax.tree.leaves(params)[0].dtype)
        state = {"loss": jnp.zeros((), dtype), "weight": jnp.zeros((), dtype), "rf": carry}
        state["activation"] = _slots(stage.carry, table.slots.activation)
        if not any(phase.backward for phase in table.phases):
            return state
        # One row per repeat, but no lone row: XLA adds to [1, ...] in a new buffer and copies it back.
        rows = (schedule.repeats,) if schedule.repeats > 1 else ()
        state |= {
            "dx": carry,
            "residual": _slots(stage.residuals, table.slots.residual),
            "ends": jax.tree.map(lambda x: jnp.zeros(x.shape, accumulator_dtype(x.dtype)), self.ends),
            "blocks": [
                jax.tree.map(lambda x: jnp.zeros((*rows, *x.shape[1:]), accumulator_dtype(x.dtype)), tree)
                for tree in params["blocks"][0]
            ],
        }
        if not table.gradient_direct:
            state["gradient"] = _slots(stage.carry, table.slots.gradient)
        return state

    def tick(self, state: dict, row: dict, phase: Phase) -> dict:
        """One turn of the loop; `row` holds one number of each column."""
        schedule = self.program.table.schedule
        rb = y = dy = None
        if phase.backward:
            rb = hop(state["dx"], schedule.devices, schedule.repeats, -1)  # [1]
        if phase.forward:
            state, y, residuals = self.forward_lane(state, row)
            if phase.backward:
                rb, (y, residuals) = fence(rb, (y, residuals))
            state = self.keep(state, row, residuals) | {"rf": hop(y, schedule.devices, schedule.repeats, 1)}  # [2]
        if phase.head:
            state, dy = self.head_lane(state, row, y)
        if phase.backward:
            state, dx, dw = self.backward_lane(state, row, rb, dy)
            if phase.forward:
                state["rf"], (dx, dw) = fence(state["rf"], (dx, dw))
            state = self.add_gradients(state, row, dx, dw) | {"dx": dx}
        return state

    def forward_lane(self, state: dict, row: dict) -> tuple[dict, Tree, list]:
        """Takes in what arrived, keeps it, and runs the stage: its output and residuals."""
        table, stage = self.program.table, self.program.stage
        active = row["f_repeat"] >= 0
        slots, arrived = state["activation"], state["rf"]
        if not table.forward_direct:
            slots = _put(slots, row["f_arrival"], arrived)
            arrived = _get(slots, row["f_activation"])
        context = self.context(row["f_microbatch"], row["f_repeat"])
        x = self.embed_lane(arrived, context, row["f_repeat"])
        slots = _put(slots, jnp.where(active, row["f_activation"], -1), x)

        def idle():
            return x, self.zeros(stage.residuals)

        branches = [lambda w=w: stage.forward(w, x, context) for w in self.blocks]
        y, residuals = _switch(row["f_repeat"], idle, branches)
        return state | {"activation": slots}, y, residuals

    def embed_lane(self, arrived: Tree, context: Context, repeat) -> Tree:
        """The stage's input: what arrived, or on the first stage the embedded microbatch."""
        first = (self.device == 0) & (repeat == 0)
        embed, key = self.program.model.embed.apply, keys.embed_key(context.group)
        return lax.cond(first, lambda: embed(self.ends["embed"], context.mb, key), lambda: arrived)

    def keep(self, state: dict, row: dict, residuals: list) -> dict:
        """Puts the residuals into their slot."""
        if "residual" not in state:
            return state
        return state | {"residual": _put(state["residual"], row["f_residual"], residuals)}

    def head_lane(self, state: dict, row: dict, y: Tree) -> tuple[dict, Tree]:
        """Loss of the microbatch that leaves the last stage and, when training, its gradient."""
        active = row["h_gradient"] >= 0
        context = self.context(row["f_microbatch"], row["f_repeat"])
        key = keys.head_key(context.group, len(self.program.model.blocks))
        dtype = state["loss"].dtype

        head = self.program.ends.head(self.ends)

        def loss(head, y):
            total, weight = self.program.model.head_loss.apply(head, y, context.mb, key)
            return total.astype(dtype), lax.stop_gradient(weight).astype(dtype)

        zero = jnp.zeros((), dtype)
        if "dx" not in state:
            total, weight = lax.cond(active, lambda: loss(head, y), lambda: (zero, zero))
            return state | {"loss": state["loss"] + total, "weight": state["weight"] + weight}, None

        def run():
            total, vjp, weight = jax.vjp(loss, head, y, has_aux=True)
            return (total, weight, *vjp(jnp.ones((), dtype)))

        def idle():
            return zero, zero, self.zeros(head), y

        total, weight, dhead, dy = lax.cond(active, run, idle)
        state = state | {"loss": state["loss"] + total, "weight": state["weight"] + weight}
        state["ends"] = self.program.ends.add_head(state["ends"], dhead)
        if "gradient" in state:
            state["gradient"] = _put(state["gradient"], row["h_gradient"], dy)
        return state, dy

    def backward_lane(self, state: dict, row: dict, rb: Tree, dy: Tree) -> tuple[dict, Tree, Tree]:
        """Runs a stage's vjp on the gradient that arrived or that the head made: gradients of its input and weights."""
        table, stage = self.program.table, self.program.stage
        repeats = table.schedule.repeats
        repeat = row["b_repeat"]
        if "gradient" in state:
            state = state | {"gradient": _put(state["gradient"], row["b_arrival"], rb)}
            gradient = _get(state["gradient"], row["b_gradient"])
        elif dy is None:
            gradient = rb
        else:
            last = (self.device == table.schedule.devices - 1) & (repeat == repeats - 1)
            gradient = jax.tree.map(lambda a, b: jnp.where(last, a, b), dy, rb)
        context = self.context(row["b_microbatch"], repeat)

        def idle():
            return self.zeros(stage.params), gradient

        def branch(weights):
            x = _get(state["activation"], row["b_activation"])
            residuals = _get(state["residual"], row["b_residual"])
            return stage.backward(weights, x, residuals, context, gradient)

        dw, dx = _switch(repeat, idle, [lambda w=w: branch(w) for w in self.blocks])
        return state, dx, dw

    def add_gradients(self, state: dict, row: dict, dx: Tree, dw: Tree) -> dict:
        """Adds a stage's weight gradients to the accumulators, and the embedding's on the first stage."""
        apply, repeat = self.program.model.embed.apply, row["b_repeat"]
        at = jnp.maximum(repeat, 0)
        if self.program.table.schedule.repeats == 1:
            blocks = accumulate(state["blocks"], list(dw))
        else:
            blocks = jax.tree.map(lambda acc, g: _add_at(acc, at, g), state["blocks"], list(dw))
        context = self.context(row["b_microbatch"], repeat)
        first = (self.device == 0) & (repeat == 0)
        embed, key = self.ends["embed"], keys.embed_key(context.group)

        def embed_gradient():
            _, vjp = jax.vjp(lambda p: apply(p, context.mb, key), embed)
            return vjp(dx)[0]

        gradient = lax.cond(first, embed_gradient, lambda: self.zeros(embed))
        ends = state["ends"] | {"embed": accumulate(state["ends"]["embed"], gradient)}
        return state | {"blocks": blocks, "ends": ends}

    def zeros(self, shapes: Tree) -> Tree:
        """What an idle lane returns.

        Each leaf is filled from a scalar of its own that XLA cannot see to be zero. Equal constants would be made once
        and then copied into every output.
        """
        leaves, tree = jax.tree.flatten(shapes)
        scalars = [jnp.minimum(self.device + k, 0) for k in range(len(leaves))]
        filled = [jnp.full(s.shape, x.astype(s.dtype)) for s, x in zip(leaves, scalars, strict=True)]
        return jax.tree.unflatten(tree, filled)

    def context(self, microbatch, repeat) -> Context:
        """What a lane needs to know of the microbatch and stage it works on; anything valid where it is idle."""
        microbatch, repeat = jnp.maximum(microbatch, 0), jnp.maximum(repeat, 0)
        schedule = self.program.table.schedule
        mb = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, microbatch, keepdims=False), self.batch)
        group = keys.group_key(self.key, self.shard * schedule.microbatches + microbatch)
        first_block = (repeat * schedule.devices + self.device) * self.program.layout.per_stage
        return Context(mb, group, first_block)


def _switch(repeat, idle: Callable, branches: list[Callable]):
    return lax.switch(repeat + 1, [idle, *branches])


def _slots(shapes: Tree, count: int) -> Tree:
    """Buffers of `count` slots and, at the end, one that idle lanes write."""
    return jax.tree.map(lambda s: jnp.zeros((count + 1, *s.shape), s.dtype), shapes)


def _put(slots: Tree, at, values: Tree) -> Tree:
    """Writes a slot; slot -1 is the scratch slot."""

    def put(buffer, value):
        return lax.dynamic_update_index_in_dim(buffer, value, jnp.where(at < 0, buffer.shape[0] - 1, at), 0)

    return jax.tree.map(put, slots, values)


def _get(slots: Tree, at) -> Tree:
    return jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, jnp.maximum(at, 0), keepdims=False), slots)


def _add_at(accumulator, at, gradient):
    """``accumulator[at] += gradient`` in place."""
    row = lax.dynamic_index_in_dim(accumulator, at, keepdims=False) + gradient.astype(accumulator.dtype)
    return lax.dynamic_update_index_in_dim(accumulator, row, at, 0)
