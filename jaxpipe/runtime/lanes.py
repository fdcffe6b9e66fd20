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
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.runtime import keys, skip, slots
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
        loops: Whether lanes are skipped by loops instead of branches, see `jaxpipe.runtime.skip`.
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
    loops: bool = False

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
            state, y, commit = self.forward_lane(state, row)
            if phase.backward:
                rb, (y, commit) = fence(rb, (y, commit))
            # [2] What the last tick of a phase sends arrives in the next one.
            sent = self.hops(y, self.sides("f", phase.start + 1, phase.stop + 1))
            state = commit(state) | {"rf": state["rf"] | sent}
        if phase.head:
            state, dy, commit = self.head_lane(state, row, y)
            state = commit(state)
        if phase.backward:
            state, dx, commit = self.backward_lane(state, row, rb, dy)
            if phase.forward:
                state["rf"], (dx, commit) = fence(state["rf"], (dx, commit))
            state = self.embed_gradient_lane(commit(state), row, dx) | {"dx": dx}
        if phase.weight:
            state = self.weight_lane(state, row)
        return state

    def hops(self, values: Tree, sides: list[str]) -> dict[str, Tree]:
        """What arrives from each side when every device sends `values`."""
        schedule = self.table.schedule
        ring = schedule.placement == "loop" and schedule.repeats > 1
        return {side: values if side == "own" else hop(values, schedule.devices, ring, STEP[side]) for side in sides}

    def forward_lane(self, state: dict, row: dict) -> tuple[dict, Tree, "Commit"]:
        """Takes in what arrived, keeps it, and runs the stage."""
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

        def run(repeat):
            return lambda given: stage.forward(given[0][repeat], *given[1:])

        branches = [run(c) for c in range(len(self.blocks))]
        lane = Lane(branches, partial(_keep, row["f_residual"]), stage.residuals if self.trains else [])
        state = state | {"activation": kept}
        return self.run(lane, state, ["residual"] if self.trains else [], repeat, x, (self.blocks, x, context))

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

    def head_lane(self, state: dict, row: dict, y: Tree) -> tuple[dict, Tree, "Commit"]:
        """Loss of the microbatch that leaves the last stage and, when training, its gradient."""
        context = self.context(row["f_microbatch"], row["f_repeat"])
        head, dtype = self.parts.head(self.ends), state["loss"].dtype

        def loss(head, y, context):
            key = keys.head_key(context.group, len(self.model.blocks))
            total, weight = self.model.head_loss.apply(head, y, context.mb, key)
            return total.astype(dtype), lax.stop_gradient(weight).astype(dtype)

        def evaluate(given):
            head, y, context = given
            return y, (*loss(head, y, context), None)

        def train(given):
            head, y, context = given
            total, vjp, weight = jax.vjp(lambda head, y: loss(head, y, context), head, y, has_aux=True)
            dhead, dy = vjp(jnp.ones((), dtype))
            return dy, (total, weight, dhead)

        def commit(state, kept):
            total, weight, dhead = kept
            ends = {"ends": self.parts.add_head(state["ends"], dhead)} if self.trains else {}
            return {"loss": state["loss"] + total, "weight": state["weight"] + weight} | ends

        scalar = jax.ShapeDtypeStruct((), dtype)
        lane = Lane([train if self.trains else evaluate], commit, (scalar, scalar, head if self.trains else None))
        index = jnp.minimum(row["h_gradient"], 0)
        updates = ["loss", "weight", *(["ends"] if self.trains else [])]
        state, dy, commit_now = self.run(lane, state, updates, index, y, (head, y, context))
        if "gradient" in state:
            state = state | {"gradient": slots.put(state["gradient"], row["h_gradient"], dy)}
        return state, dy, commit_now

    def backward_lane(self, state: dict, row: dict, rb: Any, dy: Tree) -> tuple[dict, Tree, "Commit"]:
        """Runs B or I of a stage on the gradient that arrived or that the head made."""
        stage, repeat = self.stage, row["b_repeat"]
        state, gradient = self.arriving_gradient(state, row, rb, dy)
        full, split = self.backward_kinds

        def run(c: int, input_only: bool, given):
            blocks, activation, residual, context, gradient = given
            x = slots.get(activation, row["b_activation"])
            known = blocks[c], x, slots.get(residual, row["b_residual"]), context
            if input_only:
                dx, crossing = stage.backward_input(*known, gradient)
                return dx, (self.zeros(stage.params) if full else None, crossing)
            dw, dx = stage.backward(*known, gradient)
            return dx, (list(dw), self.zeros(stage.weight_residuals) if split else None)

        def commit(state, kept):
            dw, crossing = kept
            if dw is not None:
                state = state | {"blocks": self.add(state["blocks"], repeat, dw)}
            if crossing is not None:
                rest = slots.put(state["weight_residual"], row["b_weight_residual"], crossing)
                state = state | {"weight_residual": rest}
            return state

        kinds = [only for only, runs in ((False, full), (True, split)) if runs]
        branches = [partial(run, c, only) for only in kinds for c in range(len(self.blocks))]
        index = repeat
        if full and split:
            index += jnp.where(row["b_input_only"] == 1, len(self.blocks), 0)
        shapes = stage.params if full else None, stage.weight_residuals if split else None
        updates = [name for name, runs in (("blocks", full), ("weight_residual", split)) if runs]
        context = self.context(row["b_microbatch"], repeat)
        given = self.blocks, state["activation"], state["residual"], context, gradient
        return self.run(Lane(branches, commit, shapes), state, updates, index, gradient, given)

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

        def run(c: int, given):
            blocks, activation, residual, crossing, context = given
            x = slots.get(activation, row["w_activation"])
            known = blocks[c], x, slots.get(residual, row["w_residual"]), context
            return (), list(stage.backward_weight(*known, slots.get(crossing, row["w_weight_residual"])))

        def commit(state, dw):
            return {"blocks": self.add(state["blocks"], repeat, dw)}

        lane = Lane([partial(run, c) for c in range(len(self.blocks))], commit, list(stage.params))
        context = self.context(row["w_microbatch"], repeat)
        given = self.blocks, state["activation"], state["residual"], state["weight_residual"], context
        state, _, commit_now = self.run(lane, state, ["blocks"], repeat, (), given)
        return commit_now(state)

    def embed_gradient_lane(self, state: dict, row: dict, dx: Tree) -> dict:
        """On the first stage, adds up the embedding's gradient."""
        repeat, apply = row["b_repeat"], self.model.embed.apply

        def run(given):
            embed, context, dx = given
            _, vjp = jax.vjp(lambda p: apply(p, context.mb, keys.embed_key(context.group)), embed)
            return (), vjp(dx)[0]

        def commit(state, gradient):
            return {"ends": state["ends"] | {"embed": accumulate(state["ends"]["embed"], gradient)}}

        embed = self.ends["embed"]
        index = jnp.where((self.device == 0) & (repeat == 0), 0, -1)
        context = self.context(row["b_microbatch"], repeat)
        state, _, commit_now = self.run(Lane([run], commit, embed), state, ["ends"], index, (), (embed, context, dx))
        return commit_now(state)

    def run(self, lane: "Lane", state: dict, updates: list[str], index, carry: Tree, given: Tree):
        """Runs a lane where `index` is not -1, in the way that suits the machine.

        Args:
            lane: What it computes and commits.
            state: The loop's state.
            updates: The entries of the state that it commits to.
            index: Which of its branches, or -1.
            carry: What it passes on if it does not run.
            given: All that its branches read.

        Returns:
            The state, what the lane passes on, and the commit that is still to be done.
        """
        if self.loops:
            part = {name: state[name] for name in updates}
            part, carry = skip.run_loop(index, lane.branches, lane.commit, part, carry, given)
            return state | part, carry, Commit(None, None)
        branches = [lambda branch=branch: branch(given) for branch in lane.branches]
        carry, kept = skip.run_branch(index, branches, lambda: (carry, self.zeros(lane.kept)))
        return state, carry, Commit(lane.commit, kept)

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


@dataclass(frozen=True)
class Lane:
    """What a lane computes, and what becomes of it.

    Attributes:
        branches: ``given -> (carry, kept)``: what is passed on, and what is committed.
        commit: ``(state, kept) -> state``, for the entries that the lane updates.
        kept: Shapes of what is committed.
    """

    branches: list[Callable[[Any], tuple[Tree, Any]]]
    commit: Callable[[dict, Any], dict]
    kept: Any


@jax.tree_util.register_pytree_node_class
class Commit:
    """A commit that waits for its lane's fence; calling it with the state does it."""

    def __init__(self, commit: Callable[[dict, Any], dict] | None, kept: Any):
        self.commit, self.kept = commit, kept

    def __call__(self, state: dict) -> dict:
        """The state with the commit done."""
        return state if self.commit is None else state | self.commit(state, self.kept)

    def tree_flatten(self):
        """What passes the fence: the values to be committed."""
        return (self.kept,), self.commit

    @classmethod
    def tree_unflatten(cls, commit, children):
        """The commit of values that passed the fence."""
        return cls(commit, *children)


def _keep(slot, state: dict, residuals: list) -> dict:
    """Puts a forward's residuals into their slot."""
    return {"residual": slots.put(state["residual"], slot, residuals)} if state else {}
