"""T_dev as a program: what the devices need for their own lanes, one after the other, with nothing between them."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.errors import ConfigError
from jaxpipe.runtime.loop.compile import Outcome, Program
from jaxpipe.runtime.loop.device import Device
from jaxpipe.runtime.loop.end_lanes import embed_gradient_lane, embed_lane, head_lane
from jaxpipe.runtime.model import Tree
from jaxpipe.runtime.stage.carry import join, part
from jaxpipe.runtime.stage.ends import accumulate
from jaxpipe.runtime.stage.stages import Branch, Stages
from jaxpipe.runtime.stage.wall import wall
from jaxpipe.schedule import Schedule

SUMS = ("loss", "weight", "aux", "metrics", "ends", "blocks")
"""The entries of the loop's state that are added up; slots and what is under way are not needed here."""

Known = tuple[Any, Any, Any, Any]
"""Parameters, input, residuals and context of a stage."""


def lanes_only(program: Program, params: Tree, batch: Tree) -> Outcome:
    """Runs the stages of every device for all microbatches: forward, head on the last stage, backward, or I and W.

    Nothing is sent: a stage's input is a number that changes with the microbatch, its output's gradient is the output
    itself. The numbers mean nothing; the time does.

    Args:
        program: From `Pipeline.program`.
        params: Pipeline parameters.
        batch: Leaves ``[B, ...]``.
    """
    program = replace(program, skip="loop" if program.skip == "mask" else program.skip)
    return program(params, batch, None, loop=_run)


def _run(device: Device, state: dict) -> dict:
    stages, schedule = device.stages, device.table.schedule
    split = _split(schedule)
    carry = jax.tree.map(lambda s: jnp.full(s.shape, 0.5, s.dtype), stages.stage.carry)
    never = jnp.minimum(device.place, 0)

    def microbatch(state_and_x, m):
        state, x = state_and_x
        for repeat in range(schedule.repeats):
            at, branch = jnp.int32(repeat), _branch(stages, repeat)
            row = {"f_microbatch": m, "b_microbatch": m, "f_repeat": at, "b_repeat": at}
            context = device.context(m, at)
            weights = stages.params(branch, device.blocks, device.shared)
            x = embed_lane(device, x, context, row)
            y, aux, residuals = branch.stage.forward(weights, x, context)
            x, y, aux, residuals = _apart(never, (x, y, aux, residuals))
            if aux:
                state = state | {"aux": accumulate(state["aux"], aux)}
            dy = part(y)[0]
            if repeat == schedule.repeats - 1:
                last = device.place == schedule.device_of(schedule.stages - 1)
                state, dy, commit = head_lane(device, state, row | {"h_gradient": jnp.where(last, 0, -1)}, y)
                state = commit(state)
            known = weights, x, residuals, context
            only = jnp.asarray(split[repeat])[m, device.place] if _mixed(split) else split[repeat][0][0]
            dx, dw = _backward(branch, only, known, dy, device.daux, never)
            dx, dw = _apart(never, (dx, dw))
            state = state | device.add(state, at, device.gradients(branch, dw))
            state = embed_gradient_lane(device, state, row, dx)
            x, _ = _apart(never, (_varied(carry, m), dx))
        return (state, x), None

    sums = {name: state[name] for name in SUMS if name in state}
    (sums, _), _ = lax.scan(microbatch, (sums, carry), jnp.arange(schedule.microbatches))
    return state | sums


def _backward(branch: Branch, only: Any, known: Known, dy: list, daux: dict, never: Any) -> tuple[list, Tree]:
    """B, or I and then W where `only` says so: ``(dx, dparams)``."""
    stage = branch.stage

    def halves(known: Known, dy, daux):
        weights, x, residuals, context = known
        out = *stage.backward_input(*known, dy, daux), x, residuals
        dx, crossing, x, residuals = _apart(never, out)
        return dx, stage.backward_weight(weights, x, residuals, context, crossing)

    def whole(known: Known, dy, daux):
        dw, dx = stage.backward(*known, dy, daux)
        return dx, dw

    if isinstance(only, bool):
        return (halves if only else whole)(known, dy, daux)
    return lax.cond(only, halves, whole, known, dy, daux)


def _apart(never: Any, values: tuple) -> tuple:
    """The values as another lane finds them: what was computed beside them has to be computed again there."""
    floating, others = part(values)
    return join(values, wall(never, floating), others)


def _varied(carry: Tree, m: Any) -> Tree:
    """Another input for each microbatch: what does not change would be computed once, before the loop."""
    floating, others = part(carry)
    return join(carry, [x * (1 + 0.01 * m).astype(x.dtype) for x in floating], others)


def _split(schedule: Schedule) -> list[list[list[bool]]]:
    """``[repeat][microbatch][device]``: whether its backward is split."""
    halves = {(a.stage, a.microbatch) for actions in schedule.order for a in actions if a.phase == "I"}
    return [
        [
            [(schedule.stage_at(device, repeat), m) in halves for device in range(schedule.devices)]
            for m in range(schedule.microbatches)
        ]
        for repeat in range(schedule.repeats)
    ]


def _mixed(split: list[list[list[bool]]]) -> bool:
    return len({only for rows in split for row in rows for only in row}) > 1


def _branch(stages: Stages, repeat: int) -> Branch:
    """The branch that all devices take for a repeat."""
    numbers = set(stages.number[repeat])
    if len(numbers) > 1:
        raise ConfigError("stages that differ between devices cannot be measured; try as many equal blocks per stage")
    return stages.branches[numbers.pop()]
