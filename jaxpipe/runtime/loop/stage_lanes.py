"""The lanes that run stages: forward, backward (B or I) and weight gradient."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.runtime.loop import end_lanes, slots, vocab_lanes
from jaxpipe.runtime.loop.device import Device, Gradients
from jaxpipe.runtime.loop.lane import Commit, Lane
from jaxpipe.runtime.model import Tree
from jaxpipe.runtime.stage.carry import join, part
from jaxpipe.runtime.stage.ends import accumulate
from jaxpipe.runtime.stage.stages import Choice
from jaxpipe.schedule import TickTable
from jaxpipe.schedule.lowering.table import ARRIVAL


def forward_lane(device: Device, state: dict, row: dict, arrived: Any, head: bool = False) -> tuple[dict, Tree, Commit]:
    """Takes in what arrived from each side, keeps it, and runs the stage.

    Args:
        device: The device.
        state: The loop's state.
        row: The row of the table.
        arrived: By side, what arrived.
        head: Whether the last stage goes on with the head, in this lane. When training it passes on the gradient of its
            output then, for nobody else needs the output.
    """
    stages, kept, repeat = device.stages, state["activation"], row["f_repeat"]
    if device.table.forward_direct:
        arrived = select("f", row, arrived, stages.stage.carry)
    else:
        kept = take_in("f", row, kept, arrived, device.keep)
        arrived = device.fetch(kept, row["f_activation"])
    context = device.context(row["f_microbatch"], repeat)
    if device.embeds_inside:
        x = arrived
    elif "embed" in device.parts.cut:
        x = vocab_lanes.embed_lane(device, arrived, row)
    else:
        x = end_lanes.embed_lane(device, arrived, context, row)
    x = device.lay(x)
    if not device.embeds_inside:
        kept = device.keep(kept, jnp.where(repeat >= 0, row["f_activation"], -1), x)

    def run(choice: Choice, given, entries):
        blocks, shared, ends, x, context, seed = given
        made = {}
        if choice.first:
            with jax.named_scope("embed"):
                x = device.lay(end_lanes.embed(device, ends["embed"], context))
        if choice.first or (device.embeds_inside and device.table.forward_direct):
            made["activation"] = x
        params = stages.params(choice.branch, blocks, shared)
        y, made["aux"], residuals = choice.branch.stage.forward(params, x, context)
        y = device.lay(y)
        if device.trains and (residuals or not device.branches_commit):
            made["residual"] = stages.residuals.fill(residuals, device.zeros)
        if choice.last:
            floating, others = part(y)
            known = device.parts.head(ends), floating, others, context, seed
            with jax.named_scope("head"):
                made["gradient"], made["head"] = end_lanes.head(device, state["loss"].dtype, y, known, entries)
            y = device.lay(join(y, made["gradient"], others))
        return y, made

    def commit(state: dict, made: dict) -> dict:
        out = {"aux": accumulate(state["aux"], aux)} if (aux := made["aux"]) else {}
        for name in ("activation", "residual"):
            if name in made:
                out[name] = device.keep(state[name], row[f"f_{name}"], made[name])
        if "head" in made:
            out |= end_lanes.commit_head(device, row, False, state, made["head"])
        if "gradient" in made and "gradient" in state:
            out["gradient"] = slots.put(state["gradient"], row["h_gradient"], made["gradient"])
        return out

    shapes: dict[str, Any] = {"aux": dict(stages.stage.aux)}
    shapes |= {"residual": list(stages.residuals.shapes)} if device.trains else {}
    uses = {"aux": bool(stages.stage.aux), "residual": device.trains, "activation": device.embeds_inside}
    updates = [name for name, used in uses.items() if used]
    if head:
        updates += [*end_lanes.head_updates(device), *(["gradient"] if "gradient" in state else [])]
    choices = device.choices("f", first=device.embeds_inside, last=head)
    branches: list[Callable] = [partial(run, choice) for choice in choices.each]
    lane = Lane("forward", branches, commit, shapes, updates, ("f", row), adds=True)
    ends = device.ends if device.embeds_inside or head else {}
    given = device.blocks, device.shared, ends, x, context, device.seeds[0]
    return device.run(lane, state | {"activation": kept}, choices.index(repeat, device.place), x, given)


def backward_lane(device: Device, state: dict, row: dict, rb: Any, dy: list | None) -> tuple[dict, list, Commit]:
    """Runs B or I of a stage on the gradient that arrived or that the head made, and maybe the embedding's gradient."""
    stages, repeat = device.stages, row["b_repeat"]
    state, gradient = _arriving_gradient(device, state, row, rb, dy)
    gradient = device.lay(gradient)
    full, split = backward_kinds(device.table)

    def run(choice: Choice, input_only: bool, given):
        blocks, shared, embed, activation, residual, context, gradient, daux = given
        branch = choice.branch
        stage = branch.stage
        residuals = stages.residuals.take(stage.residuals, device.fetch(residual, row["b_residual"]))
        x = device.fetch(activation, row["b_activation"])
        arguments = stages.params(branch, blocks, shared), x, residuals, context, gradient, daux
        if input_only:
            dx, crossing = stage.backward_input(*arguments)
            none = Gradients(None, device.zeros(stages.gradients)) if full and not device.branches_commit else None
            made = none, stages.weight_residuals.fill(crossing, device.zeros)
        else:
            dw, dx = device.wide(stage.backward, *arguments)
            none = device.zeros(list(stages.weight_residuals.shapes)) if split and not device.branches_commit else None
            made = device.gradients(branch, dw), none
        dx, dembed = device.lay(dx), None
        if choice.first:
            with jax.named_scope("embed_gradient"):
                dembed = end_lanes.embed_gradient(device, embed, context, dx)
        return dx, (*made, dembed)

    def commit(state: dict, kept) -> dict:
        gradients, crossing, dembed = kept
        out = {} if gradients is None else device.add(state, repeat, gradients)
        if crossing is not None:
            out["weight_residual"] = device.keep(state["weight_residual"], row["b_weight_residual"], crossing)
        return out if dembed is None else out | end_lanes.commit_embed(state | out, dembed)

    kinds = [only for only, runs in ((False, full), (True, split)) if runs]
    choices = device.choices("b", first=device.embeds_inside)
    branches: list[Callable] = [partial(run, choice, only) for only in kinds for choice in choices.each]
    index = choices.index(repeat, device.place)
    if full and split:
        index += jnp.where(row["b_input_only"] == 1, len(choices.each), 0)
    gradients = Gradients(None, stages.gradients) if full else None
    shapes = gradients, list(stages.weight_residuals.shapes) if split else None, None
    updates = [*(device.updates if full else []), *(["weight_residual"] if split else [])]
    updates += ["ends"] if device.embeds_inside and "ends" not in updates else []
    context = device.context(row["b_microbatch"], repeat)
    stash, embed = (state["activation"], state["residual"]), device.ends["embed"] if device.embeds_inside else {}
    given = device.blocks, device.shared, embed, *stash, context, gradient, device.daux
    lane = Lane("backward", branches, commit, shapes, updates, ("b", row))
    return device.run(lane, state, index, gradient, given)


def weight_lane(device: Device, state: dict, row: dict) -> dict:
    """Runs W of a stage and adds up what it makes."""
    stages, repeat = device.stages, row["w_repeat"]

    def run(choice: Choice, given):
        blocks, shared, activation, residual, crossing, context = given
        branch, stage = choice.branch, choice.branch.stage
        x = device.fetch(activation, row["w_activation"])
        residuals = stages.residuals.take(stage.residuals, device.fetch(residual, row["w_residual"]))
        crossing = device.fetch(crossing, row["w_weight_residual"])
        crossing = stages.weight_residuals.take(stage.weight_residuals, crossing)
        params = stages.params(branch, blocks, shared)
        dw, _ = device.wide(lambda *known: (stage.backward_weight(*known), ()), params, x, residuals, context, crossing)
        return (), device.gradients(branch, dw)

    choices = device.choices("w")
    branches: list[Callable] = [partial(run, choice) for choice in choices.each]

    def commit(state: dict, gradients: Gradients) -> dict:
        return device.add(state, repeat, gradients)

    lane = Lane("weight_gradient", branches, commit, Gradients(None, stages.gradients), device.updates, ("w", row))
    context = device.context(row["w_microbatch"], repeat)
    slots_read = (state[name] for name in ("activation", "residual", "weight_residual"))
    given = device.blocks, device.shared, *slots_read, context
    state, _, commit_now = device.run(lane, state, choices.index(repeat, device.place), (), given)
    return commit_now(state)


def take_in(lane: str, row: dict, kept: Tree, arrived: dict[str, Tree], put: Callable) -> Tree:
    """Puts what arrived into the slots that the row names."""
    for side, values in arrived.items():
        kept = put(kept, row[ARRIVAL[lane][side]], values)
    return kept


def select(lane: str, row: dict, arrived: dict[str, Tree], shapes: Tree) -> Tree:
    """What arrived from the side that the row names; anything valid if nothing did."""
    if not arrived:
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (_, values), *others = arrived.items()
    for side, other in others:
        here = row[ARRIVAL[lane][side]] >= 0
        values = jax.tree.map(lambda a, b, here=here: jnp.where(here, a, b), other, values)
    return values


def _arriving_gradient(device: Device, state: dict, row: dict, rb: Any, dy: list | None) -> tuple[dict, list]:
    """The gradient of the stage's output, from its slot, from a neighbour or from the head."""
    if "gradient" in state:
        kept = take_in("b", row, state["gradient"], rb, slots.put)
        return state | {"gradient": kept}, slots.get(kept, row["b_gradient"])
    arrived = select("b", row, rb, device.stages.stage.gradient)
    if dy is None:
        return state, arrived
    schedule = device.table.schedule
    owner = schedule.device_of(schedule.stages - 1)
    last = (device.place == owner) & (row["b_repeat"] == schedule.repeats - 1)
    return state, jax.tree.map(lambda a, b: jnp.where(last, a, b), dy, arrived)


def backward_kinds(table: TickTable) -> tuple[bool, bool]:
    """Whether the backward lane runs B anywhere, and whether it runs I."""
    cells = zip(table.columns["b_repeat"], table.columns["b_input_only"], strict=True)
    kinds = {only == 1 for repeats, onlys in cells for r, only in zip(repeats, onlys, strict=True) if r >= 0}
    return False in kinds, True in kinds
