"""The lanes of one device: what a tick does with the loop's state.

The state is a dict, one entry per kind of thing that lives from tick to tick:

    loss, weight       sums so far
    rf                 by side, what the neighbours' (or this device's own) forward lanes sent
    dx                 what this device's last backward lane made, not sent yet
    activation, residual, gradient, weight_residual      slots
    ends, blocks       gradient accumulators
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.runtime import keys, slots
from jaxpipe.runtime.ends import Ends, accumulate, accumulator_dtype
from jaxpipe.runtime.model import Model, Tree
from jaxpipe.runtime.stage import Context, Stage
from jaxpipe.runtime.transfer import fence, hop
from jaxpipe.schedule import TickTable
from jaxpipe.schedule.table import ARRIVAL, Phase

STEP = {"left": 1, "right": -1}
"""What arrives from a side was sent this way round."""


@dataclass(frozen=True)
class Lanes:
    """The lanes of one device.

    Attributes:
        model: The model.
        table: The tick table.
        stage: A stage's lane functions.
        parts: Embedding and head.
        per_stage: Blocks per stage.
        device: This device's place, int32.
        shard: This device's data shard, int32.
        batch: Leaves ``[M, rows, ...]``.
        key: A key or None.
        blocks: Weights, ``blocks[repeat][j]``.
        ends: Gathered embedding and head parameters.
    """

    model: Model
    table: TickTable
    stage: Stage
    parts: Ends
    per_stage: int
    device: Any
    shard: Any
    batch: Tree
    key: Any
    blocks: list
    ends: Tree

    @cached_property
    def trains(self) -> bool:
        """Whether there is a backward lane."""
        return any(phase.backward for phase in self.table.phases)

    @cached_property
    def backward_kinds(self) -> tuple[bool, bool]:
        """Whether the backward lane runs B anywhere, and whether it runs I."""
        cells = zip(self.table.columns["b_repeat"], self.table.columns["b_input_only"], strict=True)
        kinds = {only == 1 for repeats, onlys in cells for r, only in zip(repeats, onlys, strict=True) if r >= 0}
        return False in kinds, True in kinds

    def sides(self, lane: str, start: int = 0, stop: int | None = None) -> list[str]:
        """The sides from which something arrives for a lane in these ticks."""
        columns = {side: self.table.columns[name][start:stop] for side, name in ARRIVAL[lane].items()}
        return [side for side, rows in columns.items() if any(slot >= 0 for row in rows for slot in row)]

    def start(self, params: Tree) -> dict:
        """The loop's state before the first tick."""
        table, stage, counts = self.table, self.stage, self.table.slots
        carry = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), stage.carry)
        dtype = accumulator_dtype(jax.tree.leaves(params)[0].dtype)
        state = {"loss": jnp.zeros((), dtype), "weight": jnp.zeros((), dtype)}
        state |= {"rf": dict.fromkeys(self.sides("f"), carry)}
        state["activation"] = slots.make(stage.carry, counts.activation)
        if not self.trains:
            return state
        # One row per repeat, but no lone row: XLA adds to [1, ...] in a new buffer and copies it back.
        rows = (table.schedule.repeats,) if table.schedule.repeats > 1 else ()
        state |= {
            "dx": carry,
            "residual": slots.make(stage.residuals, counts.residual),
            "ends": jax.tree.map(lambda x: jnp.zeros(x.shape, accumulator_dtype(x.dtype)), self.ends),
            "blocks": [
                jax.tree.map(lambda x: jnp.zeros((*rows, *x.shape[1:]), accumulator_dtype(x.dtype)), tree)
                for tree in params["blocks"][0]
            ],
        }
        if not table.gradient_direct:
            state["gradient"] = slots.make(stage.carry, counts.gradient)
        if self.backward_kinds[1]:
            state["weight_residual"] = slots.make(stage.weight_residuals, counts.weight_residual)
        return state

    def tick(self, state: dict, row: dict, phase: Phase) -> dict:
        """One turn of the loop; `row` holds one number of each column."""
        rb = y = dy = None
        if phase.backward:
            rb = self.hops(state["dx"], self.sides("b", phase.start, phase.stop))  # [1]
        if phase.forward:
            state, y, residuals = self.forward_lane(state, row)
            if phase.backward:
                rb, (y, residuals) = fence(rb, (y, residuals))
            # [2] What the last tick of a phase sends arrives in the next one.
            sent = self.hops(y, self.sides("f", phase.start + 1, phase.stop + 1))
            state = self.keep(state, row, residuals) | {"rf": state["rf"] | sent}
        if phase.head:
            state, dy = self.head_lane(state, row, y)
        if phase.backward:
            state, dx, dw, crossing = self.backward_lane(state, row, rb, dy)
            if phase.forward:
                state["rf"], (dx, dw, crossing) = fence(state["rf"], (dx, dw, crossing))
            state = self.add_gradients(state, row, dx, dw, crossing) | {"dx": dx}
        if phase.weight:
            state = self.weight_lane(state, row)
        return state

    def hops(self, values: Tree, sides: list[str]) -> dict[str, Tree]:
        """What arrives from each side when every device sends `values`."""
        schedule = self.table.schedule
        ring = schedule.placement == "loop" and schedule.repeats > 1
        return {side: values if side == "own" else hop(values, schedule.devices, ring, STEP[side]) for side in sides}

    def forward_lane(self, state: dict, row: dict) -> tuple[dict, Tree, list]:
        """Takes in what arrived, keeps it, and runs the stage: its output and residuals."""
        stage, kept, repeat = self.stage, state["activation"], row["f_repeat"]
        arrived = state["rf"]
        if self.table.forward_direct:
            arrived = self.select("f", row, arrived)
        else:
            kept = self.take_in("f", row, kept, arrived)
            arrived = slots.get(kept, row["f_activation"])
        context = self.context(row["f_microbatch"], repeat)
        x = self.embed_lane(arrived, context, repeat)
        kept = slots.put(kept, jnp.where(repeat >= 0, row["f_activation"], -1), x)

        def idle():
            return x, self.zeros(stage.residuals)

        branches = [idle, *(lambda w=w: stage.forward(w, x, context) for w in self.blocks)]
        y, residuals = lax.switch(repeat + 1, branches)
        return state | {"activation": kept}, y, residuals

    def take_in(self, lane: str, row: dict, kept: Tree, arrived: dict[str, Tree]) -> Tree:
        """Puts what arrived into the slots that the row names."""
        for side, values in arrived.items():
            kept = slots.put(kept, row[ARRIVAL[lane][side]], values)
        return kept

    def select(self, lane: str, row: dict, arrived: dict[str, Tree]) -> Tree:
        """What arrived from the side that the row names; anything valid if nothing did."""
        if not arrived:
            return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.stage.carry)
        (_, values), *others = arrived.items()
        for side, other in others:
            here = row[ARRIVAL[lane][side]] >= 0
            values = jax.tree.map(lambda a, b, here=here: jnp.where(here, a, b), other, values)
        return values

    def embed_lane(self, arrived: Tree, context: Context, repeat) -> Tree:
        """The stage's input: what arrived, or on the first stage the embedded microbatch."""
        first = (self.device == 0) & (repeat == 0)
        embed, key = self.model.embed.apply, keys.embed_key(context.group)
        return lax.cond(first, lambda: embed(self.ends["embed"], context.mb, key), lambda: arrived)

    def keep(self, state: dict, row: dict, residuals: list) -> dict:
        """Puts the residuals into their slot."""
        if not self.trains:
            return state
        return state | {"residual": slots.put(state["residual"], row["f_residual"], residuals)}

    def head_lane(self, state: dict, row: dict, y: Tree) -> tuple[dict, Tree]:
        """Loss of the microbatch that leaves the last stage and, when training, its gradient."""
        active = row["h_gradient"] >= 0
        context = self.context(row["f_microbatch"], row["f_repeat"])
        key = keys.head_key(context.group, len(self.model.blocks))
        dtype = state["loss"].dtype
        head = self.parts.head(self.ends)

        def loss(head, y):
            total, weight = self.model.head_loss.apply(head, y, context.mb, key)
            return total.astype(dtype), lax.stop_gradient(weight).astype(dtype)

        zero = jnp.zeros((), dtype)
        if not self.trains:
            total, weight = lax.cond(active, lambda: loss(head, y), lambda: (zero, zero))
            return state | {"loss": state["loss"] + total, "weight": state["weight"] + weight}, None

        def run():
            total, vjp, weight = jax.vjp(loss, head, y, has_aux=True)
            return (total, weight, *vjp(jnp.ones((), dtype)))

        def idle():
            return zero, zero, self.zeros(head), y

        total, weight, dhead, dy = lax.cond(active, run, idle)
        state = state | {"loss": state["loss"] + total, "weight": state["weight"] + weight}
        state["ends"] = self.parts.add_head(state["ends"], dhead)
        if "gradient" in state:
            state["gradient"] = slots.put(state["gradient"], row["h_gradient"], dy)
        return state, dy

    def backward_lane(self, state: dict, row: dict, rb: Any, dy: Tree) -> tuple[dict, Tree, Tree, Any]:
        """Runs B or I of a stage on the gradient that arrived or that the head made.

        Returns:
            The state; the gradient of the stage's input; from B the gradients of its weights; from I what W needs. None
            for what no tick of the table makes.
        """
        stage, repeat = self.stage, row["b_repeat"]
        state, gradient = self.arriving_gradient(state, row, rb, dy)
        context = self.context(row["b_microbatch"], repeat)
        full, split = self.backward_kinds

        def run(weights, input_only: bool):
            x = slots.get(state["activation"], row["b_activation"])
            residuals = slots.get(state["residual"], row["b_residual"])
            if input_only:
                dx, crossing = stage.backward_input(weights, x, residuals, context, gradient)
                return dx, self.zeros(stage.params) if full else None, crossing
            dw, dx = stage.backward(weights, x, residuals, context, gradient)
            return dx, list(dw), self.zeros(stage.weight_residuals) if split else None

        def idle():
            dw = list(self.zeros(stage.params)) if full else None
            return gradient, dw, self.zeros(stage.weight_residuals) if split else None

        kinds = [only for only, runs in ((False, full), (True, split)) if runs]
        branches = [idle, *(lambda w=w, only=only: run(w, only) for only in kinds for w in self.blocks)]
        index = repeat + 1
        if full and split:
            index += jnp.where(row["b_input_only"] == 1, len(self.blocks), 0)
        return state, *lax.switch(index, branches)

    def arriving_gradient(self, state: dict, row: dict, rb: Any, dy: Tree) -> tuple[dict, Tree]:
        """The gradient of the stage's output, from its slot, from a neighbour or from the head."""
        if "gradient" in state:
            kept = self.take_in("b", row, state["gradient"], rb)
            return state | {"gradient": kept}, slots.get(kept, row["b_gradient"])
        arrived = self.select("b", row, rb)
        if dy is None:
            return state, arrived
        schedule = self.table.schedule
        owner = schedule.device_of(schedule.stages - 1)
        last = (self.device == owner) & (row["b_repeat"] == schedule.repeats - 1)
        return state, jax.tree.map(lambda a, b: jnp.where(last, a, b), dy, arrived)

    def weight_lane(self, state: dict, row: dict) -> dict:
        """Runs W of a stage and adds up what it makes."""
        stage, repeat = self.stage, row["w_repeat"]
        context = self.context(row["w_microbatch"], repeat)

        def run(weights):
            x = slots.get(state["activation"], row["w_activation"])
            residuals = slots.get(state["residual"], row["w_residual"])
            crossing = slots.get(state["weight_residual"], row["w_weight_residual"])
            return list(stage.backward_weight(weights, x, residuals, context, crossing))

        branches: list[Callable] = [lambda: list(self.zeros(stage.params)), *(lambda w=w: run(w) for w in self.blocks)]
        return state | {"blocks": self.add(state["blocks"], repeat, lax.switch(repeat + 1, branches))}

    def add_gradients(self, state: dict, row: dict, dx: Tree, dw: Any, crossing: Any) -> dict:
        """Adds a stage's weight gradients or keeps what W needs for them; adds the embedding's on the first stage."""
        apply, repeat = self.model.embed.apply, row["b_repeat"]
        context = self.context(row["b_microbatch"], repeat)
        first = (self.device == 0) & (repeat == 0)
        embed, key = self.ends["embed"], keys.embed_key(context.group)

        def embed_gradient():
            _, vjp = jax.vjp(lambda p: apply(p, context.mb, key), embed)
            return vjp(dx)[0]

        gradient = lax.cond(first, embed_gradient, lambda: self.zeros(embed))
        state = state | {"ends": state["ends"] | {"embed": accumulate(state["ends"]["embed"], gradient)}}
        if dw is not None:
            state["blocks"] = self.add(state["blocks"], repeat, dw)
        if crossing is not None:
            state["weight_residual"] = slots.put(state["weight_residual"], row["b_weight_residual"], crossing)
        return state

    def add(self, accumulators: list, repeat, gradients: list) -> list:
        """Adds the weight gradients of a stage; those of an idle lane are zero."""
        if self.table.schedule.repeats == 1:
            return accumulate(accumulators, gradients)
        return slots.add(accumulators, jnp.maximum(repeat, 0), gradients)

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
        schedule = self.table.schedule
        mb = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, microbatch, keepdims=False), self.batch)
        group = keys.group_key(self.key, self.shard * schedule.microbatches + microbatch)
        place = self.device
        if schedule.placement == "v":
            place = jnp.where(repeat % 2 == 1, schedule.devices - 1 - place, place)
        return Context(mb, group, (repeat * schedule.devices + place) * self.per_stage)
