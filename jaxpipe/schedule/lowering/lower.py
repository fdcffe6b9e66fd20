"""From a schedule to the tables that the compiled loop scans over.

`pack` says which ticks there can be, `slots` which buffer a value rests in, `table` what the columns mean. Here the
cheapest packing is chosen and the columns are filled. `replay.check` runs a table on paper and knows nothing of this.

A gradient that is always used in the tick in which it arrives needs no slot at all, and neither has an activation to be
read back then (`TickTable.forward_direct`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from jaxpipe.errors import ScheduleError
from jaxpipe.schedule.costs import Costs, check_costs
from jaxpipe.schedule.ir import Schedule, check_schedule
from jaxpipe.schedule.lowering.lockstep import lockstep_makespan
from jaxpipe.schedule.lowering.pack import LANE, Packed, order_peak, pack, packings
from jaxpipe.schedule.lowering.slots import KINDS, Interval, action_ticks, colour, lifetimes
from jaxpipe.schedule.lowering.table import ARRIVAL, COLUMNS, SEND, ModelBytes, Phase, Slots, TickTable
from jaxpipe.schedule.verify import verify

__all__ = ["ModelBytes", "Phase", "Slots", "TickTable", "lower"]


def lower(
    schedule: Schedule,
    packing: Literal["auto", "paired", "single"] = "auto",
    costs: Costs | None = None,
    memory: Literal["ideal", "strict"] = "ideal",
    keeps: Sequence[bool] | None = None,
) -> TickTable:
    """Turns a schedule into tick tables.

    Args:
        schedule: Any schedule, of the catalogue or not; it is verified first.
        packing: ``paired`` lets actions of different lanes share a tick (whatever form of it is cheapest), ``single``
            runs one action per tick, ``auto`` takes the smallest lockstep makespan for the costs given, ties to fewer
            activations.
        costs: Times of the phases, by default all 1.
        memory: ``ideal`` may move forwards ahead so that hops hide behind the other lane, or put weight gradients off
            so that ticks are equally long; both keep more activations (`1f1b` then runs as `eager_1f1b`; the table's
            notes say so). ``strict`` keeps no more than the schedule's own order does.
        keeps: One flag per stage: whether its forward keeps residuals for its backward beside the stage's input. By
            default all do. A stage that runs its forward again in the backward keeps none and gets no residual slot.

    Returns:
        The tables.

    Raises:
        ScheduleError: The schedule does not verify, an option has an unknown value, or `keeps` does not have one flag
            per stage.

    Example:
        >>> from jaxpipe.schedule import build, lower
        >>> table = lower(build("interleaved_1f1b", devices=4, microbatches=8, repeats=2))
        >>> table.ticks, table.slots.activation, table.slots.gradient
        (26, 11, 0)
    """
    check_schedule(schedule)
    check_costs(costs)
    if packing not in ("auto", "paired", "single"):
        raise ScheduleError(f"packing={packing!r} must be 'auto', 'paired' or 'single'; try 'auto'")
    if memory not in ("ideal", "strict"):
        raise ScheduleError(f"memory={memory!r} must be 'ideal' or 'strict'; try 'ideal'")
    if keeps is not None and len(keeps) != schedule.stages:
        raise ScheduleError(f"keeps has {len(keeps)} flags but must have one per stage; try {schedule.stages}")
    packed = choose(verify(schedule), packing, costs or Costs(), memory)
    return tabulate(packed, _notes(schedule, packed), keeps)


def choose(
    schedule: Schedule, packing: Literal["auto", "paired", "single"], costs: Costs, memory: Literal["ideal", "strict"]
) -> Packed:
    """The cheapest packing: smallest lockstep makespan, then fewest activations, then fewest ticks.

    Args:
        schedule: A verified schedule.
        packing: As in `lower`.
        costs: As in `lower`.
        memory: As in `lower`.
    """
    # [1] In its own order a schedule keeps what the order keeps: an action joins a tick only behind those before it.
    candidates = packings(schedule, packing, advance=memory == "ideal")
    priced = [(round(lockstep_makespan(p, costs), 9), p) for p in candidates]
    least = min(makespan for makespan, _ in priced)
    cheapest = [p for makespan, p in priced if makespan == least]
    return min(cheapest, key=lambda p: (max(p.peak_stages()), p.ticks)) if len(cheapest) > 1 else cheapest[0]


def _notes(schedule: Schedule, packed: Packed) -> tuple[str, ...]:
    own, kept = order_peak(schedule), packed.peak_stages()
    if packed.schedule.order == schedule.order or kept == own:
        return ()
    if packed.sharing == "weights_held":
        return (
            f"{schedule.name} runs with weight gradients put off until all devices run backwards, so that ticks are "
            f"equally long: device 0 keeps {kept[0]} stage inputs instead of {own[0]}; memory='strict' keeps {own[0]}",
        )
    return (
        f"{schedule.name} runs with forwards moved ahead so that hops are hidden: device 0 keeps {kept[0]} stage "
        f"inputs instead of {own[0]}; memory='strict' keeps {own[0]} and exposes every hop",
    )


def lower_sweeps(schedule: Schedule, keeps: Sequence[bool]) -> TickTable:
    """The tables of a schedule cut in two: all its forwards, and then, from gradients that are given, its backwards.

    Args:
        schedule: Any schedule; its forwards keep their order, and so do its backwards.
        keeps: As in `lower`.

    Returns:
        A table with one action per tick, of which the last forward's tick comes before the first backward's.

    Raises:
        ScheduleError: The schedule does not verify.
    """
    order = tuple(tuple(sorted(actions, key=lambda a: a.phase != "F")) for actions in verify(schedule).order)
    return tabulate(pack(replace(schedule, order=order), "single"), keeps=keeps, given=True)


def tabulate(
    packed: Packed, notes: tuple[str, ...] = (), keeps: Sequence[bool] | None = None, given: bool = False
) -> TickTable:
    """Fills the columns for actions whose ticks are known; `given` as in `lifetimes`."""
    schedule, ticks = packed.schedule, action_ticks(packed)
    keeps = (True,) * schedule.stages if keeps is None else tuple(map(bool, keeps))
    columns = {name: [[-1] * schedule.devices for _ in range(packed.ticks)] for name in COLUMNS}
    lives = [lifetimes(packed, ticks, device, keeps, given) for device in range(schedule.devices)]
    counts: dict[str, int] = dict.fromkeys(KINDS, 0)
    for device, live in enumerate(lives):
        slots: dict[str, dict[tuple[int, int], int]] = {}
        for kind, intervals in live.items():
            slots[kind], used = colour(intervals)
            counts[kind] = max(counts[kind], used)
        _put_actions(packed, device, slots, columns)
        _put_arrivals(schedule, device, live, slots, columns)
    _put_ends(packed, columns)
    direct = all(start == end for live in lives for start, end, _ in live["gradient"])
    if direct:
        counts["gradient"] = 0
    return TickTable(
        schedule=schedule,
        packing=packed.packing,
        ticks=packed.ticks,
        columns={name: tuple(map(tuple, rows)) for name, rows in columns.items()},
        slots=Slots(**counts),
        keeps=keeps,
        forward_direct=all(start == ticks["F"][s][m] for live in lives for start, _, (s, m) in live["activation"]),
        gradient_direct=direct,
        notes=notes,
    )


def _put_actions(
    packed: Packed, device: int, slots: dict[str, dict[tuple[int, int], int]], columns: dict[str, list[list[int]]]
) -> None:
    """What the lanes of a device run, read and write."""
    schedule, last = packed.schedule, packed.schedule.stages - 1
    for action, tick in zip(schedule.order[device], packed.rows[device], strict=True):
        stage, value = action.stage, (action.stage, action.microbatch)
        lane = "fbw"[LANE[action.phase]]
        row = {
            f"{lane}_repeat": schedule.repeat_of(stage),
            f"{lane}_microbatch": action.microbatch,
            f"{lane}_activation": slots["activation"][value],
            f"{lane}_residual": slots["residual"].get(value, -1),
        }
        if lane == "f" and stage == last:
            row["h_gradient"] = slots["gradient"].get(value, 0)
        elif lane == "f":
            row["f_send"] = SEND[_way(schedule, stage, stage + 1)]
        if lane == "b":
            row["b_input_only"] = int(action.phase == "I")
            row["b_gradient"] = slots["gradient"][value]
            if stage > 0:
                row["b_send"] = SEND[_way(schedule, stage, stage - 1)]
        if action.phase in "IW":
            row[f"{lane}_weight_residual"] = slots["weight_residual"][value]
        for name, number in row.items():
            columns[name][tick][device] = number


def _put_ends(packed: Packed, columns: dict[str, list[list[int]]]) -> None:
    """The microbatches that all devices embed, run the head of, or end the backward of together."""
    schedule = packed.schedule
    for name, stage, phases in (("h", schedule.stages - 1, "F"), ("e", 0, "F"), ("g", 0, "BI")):
        owner = schedule.device_of(stage)
        for action, tick in zip(schedule.order[owner], packed.rows[owner], strict=True):
            if action.stage == stage and action.phase in phases:
                columns[f"{name}_microbatch"][tick] = [action.microbatch] * schedule.devices


def _put_arrivals(
    schedule: Schedule,
    device: int,
    live: dict[str, list[Interval]],
    slots: dict[str, dict[tuple[int, int], int]],
    columns: dict[str, list[list[int]]],
) -> None:
    """Where a device puts what arrives: in the first tick of the value's life."""
    other = {"left": "right", "right": "left", "own": "own"}
    for lane, kind, step, source in (("f", "activation", -1, 0), ("b", "gradient", 1, schedule.stages - 1)):
        for start, _, value in live[kind]:
            stage = value[0]
            if stage != source:
                side = other[_way(schedule, stage + step, stage)]
                columns[ARRIVAL[lane][side]][start][device] = slots[kind][value]


def _way(schedule: Schedule, sender: int, receiver: int) -> Literal["left", "right", "own"]:
    """Which way a value leaves. On a ring it goes round even when the ring has one device."""
    if schedule.placement == "loop":
        return "right" if receiver > sender else "left"
    step = schedule.direction(sender, receiver)
    return "own" if step == 0 else "right" if step > 0 else "left"
