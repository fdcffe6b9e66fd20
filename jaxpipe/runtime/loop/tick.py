"""The tick: what one turn of the loop does with its state.

The state is a dict, one entry per kind of thing that lives from tick to tick:

    loss, weight, aux  sums so far
    metrics            of all microbatches, where they are wanted
    clock              what a clock's last note answered, where there is one
    rf                 by side, what the neighbours' (or this device's own) forward lanes sent
    y                  in its place where hops block: what this device's last forward lane made, not sent yet
    dx                 what this device's last backward lane made, not sent yet
    activation, residual, gradient, weight_residual      slots
    ends, blocks       gradient accumulators

Where hops fly, each lane's output leaves as soon as it is there. Where they block, as on simulated CPU devices, all
hops stand at the start of the tick: a hop is a meeting of all devices, and one between the lanes would make those that
run a B, I or W wait for those that run an F.
"""

import jax
import jax.numpy as jnp

from jaxpipe.runtime.layout.mesh import TENSOR
from jaxpipe.runtime.loop import end_lanes, vocab_lanes
from jaxpipe.runtime.loop.device import Device, zero
from jaxpipe.runtime.loop.end_lanes import start_metrics
from jaxpipe.runtime.loop.stage_lanes import backward_kinds, backward_lane, forward_lane, weight_lane
from jaxpipe.runtime.loop.transfer import fence, hop
from jaxpipe.runtime.model import Tree
from jaxpipe.runtime.stage.carry import part
from jaxpipe.runtime.stage.ends import accumulator_dtype
from jaxpipe.schedule.lowering.table import ARRIVAL, Phase

STEP = {"left": 1, "right": -1}
"""What arrives from a side was sent this way round."""


def start(device: Device) -> dict:
    """The loop's state before the first tick."""
    table, stages, counts = device.table, device.stages, device.table.slots
    stage = stages.stage
    carry, gradient = (jax.tree.map(zero, shapes) for shapes in (stage.carry, stage.gradient))
    number = jnp.zeros((), device.loss_dtype)
    state = {"loss": number, "weight": number}
    state |= {"y": carry} if device.hops_block else {"rf": dict.fromkeys(sides(device, "f"), carry)}
    state |= {"aux": jax.tree.map(zero, stage.aux)} if stage.aux else {}
    state |= {"metrics": start_metrics(device)} if device.metrics else {}
    state |= {"clock": jnp.int32(0)} if device.clock else {}
    state["activation"] = device.stash(stage.carry, counts.activation)
    if not device.trains:
        return state
    scratch = not device.branches_commit  # for idle lanes, and for branches that have nothing to write
    state |= {
        "dx": gradient,
        "residual": device.stash(list(stages.residuals.shapes), counts.residual, scratch),
        "ends": device.zeros(_accumulators(device.ends)),
        "blocks": block_sums(device),
    }
    if not table.gradient_direct:
        state["gradient"] = device.slots(stage.gradient, counts.gradient)
    if backward_kinds(table)[1]:
        shapes = list(stages.weight_residuals.shapes)
        state["weight_residual"] = device.stash(shapes, counts.weight_residual, scratch)
    return state


def block_sums(device: Device) -> list:
    """Gradient accumulators of all blocks, see `jaxpipe.runtime.stage.stages`: one row per repeat, but no lone row.

    XLA adds to [1, ...] in a new buffer and copies it back.
    """
    if device.branches_commit:
        return device.zeros(_accumulators(device.stages.weights))
    rows = [(a.num_rows,) if a.num_rows > 1 else () for a in device.stages.accumulators]
    sums = zip(device.stages.accumulators, rows, strict=True)
    return [device.zeros(_accumulators(a.params, lead)) for a, lead in sums]


def tick(device: Device, state: dict, row: dict, phase: Phase) -> dict:
    """One turn of the loop; `row` holds one number of each column."""
    rf, rb, y, dy = state.get("rf", {}), {}, None, None
    head_inside = phase.head and device.head_inside
    if phase.backward:
        rb = hops(device, state["dx"], sides(device, "b", phase.start, phase.stop))  # [1]
    if phase.forward and device.hops_block:
        rf = hops(device, state["y"], sides(device, "f", phase.start, phase.stop))
        rf, rb = fence(rf, rb)
    if phase.forward:
        state, y, commit = forward_lane(device, state, row, rf, head_inside)
        if device.hops_block:
            state = commit(state) | {"y": y}
        else:
            if phase.backward:
                rb, (y, commit) = fence(rb, (y, commit))
            # [2] What the last tick of a phase sends arrives in the next one.
            rf = rf | hops(device, y, sides(device, "f", phase.start + 1, phase.stop + 1))
            state = commit(state) | {"rf": rf}
    if head_inside:
        dy = part(y)[0]
    elif phase.head:
        run_head = vocab_lanes.head_lane if device.parts.cut else end_lanes.head_lane
        state, dy, commit = run_head(device, state, row, y)
        state = commit(state)
    if phase.backward:
        state, dx, commit = backward_lane(device, state, row, rb, dy)
        if phase.forward and not device.hops_block:
            state["rf"], (dx, commit) = fence(state["rf"], (dx, commit))
        state = commit(state) | {"dx": dx}
        if "embed" in device.parts.cut:
            state = vocab_lanes.embed_gradient_lane(device, state, row, dx)
        elif not device.embeds_inside:
            state = end_lanes.embed_gradient_lane(device, state, row, dx)
    if phase.weight:
        state = weight_lane(device, state, row)
    return state


def sides(device: Device, lane: str, start: int = 0, stop: int | None = None) -> list[str]:
    """The sides from which something arrives for a lane in these ticks."""
    columns = {side: device.table.columns[name][start:stop] for side, name in ARRIVAL[lane].items()}
    return [side for side, rows in columns.items() if any(slot >= 0 for row in rows for slot in row)]


def hops(device: Device, values: Tree, sides: list[str]) -> dict[str, Tree]:
    """What arrives from each side when every device sends `values`."""
    schedule = device.table.schedule
    ring = schedule.placement == "loop" and schedule.repeats > 1
    shares_stages = jax.sharding.get_abstract_mesh().shape.get(TENSOR, 1) > 1
    arrived = {}
    for side in sides:
        # What crosses `tensor` in a lane takes the one stream that there is, so a hop behind it needs another.
        second = device.second_stream and (shares_stages or any(other != "own" for other in arrived))
        arrived[side] = values if side == "own" else hop(values, schedule.devices, ring, STEP[side], second)
    return arrived


def _accumulators(params: Tree, rows: tuple[int, ...] = ()) -> Tree:
    """Shapes of the gradient sums of parameters."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct((*rows, *s.shape), accumulator_dtype(s.dtype)), params)
