"""What a compiled loop takes: the times of packed ticks, with a global wait or with lanes that wait on their own.

`lockstep_makespan` is what `lower` chooses a packing by; `run_lanes` is the same model with all starts and ends.
"""

from collections.abc import Sequence
from operator import add
from typing import Literal, NamedTuple

from jaxpipe.schedule.costs import Costs
from jaxpipe.schedule.ir import Action, Schedule
from jaxpipe.schedule.lowering.pack import Packed
from jaxpipe.schedule.lowering.timing import Heads, Interval


def lockstep_makespan(packed: Packed, costs: Costs) -> float:
    """Time when every tick waits for its slowest device.

    A hop hides behind the other lane of its tick: what F sends flies while the backward lane (and W) works, and what
    the backward lane sends flies while the next tick's F lane works. A lane with nothing to do exposes it.

    Before a head that all devices run (`Costs.head`) they wait for the slowest F lane; what F sends leaves after it.
    """
    work, sends, heads = _work(packed, costs), lanes_that_send(packed), head_ticks(packed, costs)
    total, hop = 0.0, costs.hop
    for t, (forwards, backwards) in enumerate(work):
        # [1] F's hop flies during this tick's backward lane, the backward's during the next tick's F lane.
        floor_f, floor_b = hop * (t > 0 and sends[t - 1][1]), hop * sends[t][0]
        if not floor_f and not floor_b and t not in heads:
            total += max(map(add, forwards, backwards))
            continue
        if t in heads:
            total += max(*forwards, floor_f) + costs.head + max(*backwards, floor_b)
        else:
            total += max(max(f, floor_f) + max(b, floor_b) for f, b in zip(forwards, backwards, strict=True))
    return total


def lockstep_local_makespan(
    packed: Packed, costs: Costs, waits_for: Literal["pipeline", "neighbours"] = "pipeline"
) -> float:
    """Time when each lane waits on its own: F for the F lanes of the last tick, B, I and W for the backward lanes.

    A device may run ahead of others in one lane while it waits for nothing in the other. Never more than
    `lockstep_makespan`. A head that all devices run (`Costs.head`) is a meeting of all after the F lane.

    Args:
        packed: Ticks.
        costs: Times of the phases.
        waits_for: Whose lanes: ``pipeline`` all devices', as when a hop is one collective of all; ``neighbours`` only
            those of the devices that a hop can come from.
    """
    schedule = packed.schedule
    devices = range(schedule.devices)
    steps = ((-1,), (1,)) if schedule.placement == "loop" else ((-1, 1), (-1, 1))
    sources = [[_neighbours(schedule, d, lane) for d in devices] for lane in steps]
    ready = [[0.0] * schedule.devices, [0.0] * schedule.devices]
    free = [0.0] * schedule.devices
    heads = head_ticks(packed, costs)
    for tick, (work, sends) in enumerate(zip(_work(packed, costs), lanes_that_send(packed), strict=True)):
        for lane in (0, 1):
            free = [max(free[d], ready[lane][d]) + work[lane][d] for d in devices]
            if lane == 0 and tick in heads:
                free = [max(free) + costs.head] * schedule.devices
            hop = costs.hop * sends[lane]
            if waits_for == "pipeline":
                ready[lane] = [max(free) + hop] * schedule.devices
            else:
                ready[lane] = [max(free[e] for e in sources[lane][d]) + hop for d in devices]
    return max(free)


class _Moment(NamedTuple):
    """A time, and the action that ended then (None at the start)."""

    time: float
    action: Action | None


def run_lanes(packed: Packed, costs: Costs, local: bool) -> tuple[list[list[Interval]], dict[Action, Action], Heads]:
    """The actions of every tick at their times, by the models of the makespans above.

    Args:
        packed: Ticks.
        costs: Times of the phases.
        local: Whether each lane waits on its own.

    Returns:
        Per device its intervals, which action each one waited for, and the heads that all devices run.
    """
    schedule = packed.schedule
    price, sends = costs.prices(schedule), lanes_that_send(packed)
    busy: list[list[Interval]] = [[] for _ in schedule.order]
    waited_for: dict[Action, Action] = {}
    free = [_Moment(0.0, None)] * schedule.devices
    arrived = [_Moment(0.0, None)] * 2
    with_head, heads = head_ticks(packed, costs), []
    for tick, row in enumerate(_lane_actions(packed)):
        for lane in (0, 1):
            came = arrived[lane]
            start = [came if came.time > moment.time else moment for moment in free]
            free = start.copy()
            for device, action in row[lane]:
                begin, cause = free[device]
                if cause is not None:
                    waited_for[action] = cause
                end = begin + price[action.stage, action.phase]
                busy[device].append(Interval(begin, end, action))
                free[device] = _Moment(end, action)
            if costs.hop and not local and (sends[tick][0] if lane == 1 else tick > 0 and sends[tick - 1][1]):
                # [1] What the other lane sent last arrives before this one ends.
                free = [
                    max(end, begin._replace(time=begin.time + costs.hop), key=_time)
                    for end, begin in zip(free, start, strict=True)
                ]
            if lane == 0 and tick in with_head:
                met = max(free, key=_time)
                free = [met._replace(time=met.time + costs.head)] * schedule.devices
                heads.append((met.time, met.time + costs.head))
            if local:
                slowest = max(free, key=_time)
                arrived[lane] = slowest._replace(time=slowest.time + costs.hop * sends[tick][lane])
        if not local:
            free = [max(free, key=_time)] * schedule.devices
    return busy, waited_for, tuple(heads)


def _time(moment: _Moment) -> float:
    return moment.time


def _lane_actions(packed: Packed) -> list[list[list[tuple[int, Action]]]]:
    """``[tick][lane]``: devices and what they run there; W belongs to the backward lane."""
    lanes: list[list[list[tuple[int, Action]]]] = [[[], []] for _ in range(packed.ticks)]
    for device, (actions, ticks) in enumerate(packed.timed):
        for action, tick in zip(actions, ticks, strict=True):
            lanes[tick][action.phase != "F"].append((device, action))
    return lanes


def _work(packed: Packed, costs: Costs) -> list[tuple[list[float], list[float]]]:
    """``[tick][lane][device]``: time of the F lane, and of the backward lane with W."""
    schedule = packed.schedule
    zeros = [0.0] * schedule.devices
    work = [(list(zeros), list(zeros)) for _ in range(packed.ticks)]
    for device, (actions, ticks) in enumerate(packed.timed):
        mine = [schedule.stage_at(device, repeat) for repeat in range(schedule.repeats)]
        cost = {phase: {s: costs.of(Action(s, phase, 0), schedule) for s in mine} for phase in schedule.phases}
        for a, tick in zip(actions, ticks, strict=True):
            work[tick][a.phase != "F"][device] += cost[a.phase][a.stage]
    return work


def _neighbours(schedule: Schedule, device: int, steps: Sequence[int]) -> list[int]:
    wraps = schedule.placement == "loop" and schedule.repeats > 1
    near = [device + step for step in steps]
    return [device] + [d % schedule.devices for d in near if wraps or 0 <= d < schedule.devices]


def head_ticks(packed: Packed, costs: Costs) -> frozenset[int]:
    """The ticks in which all devices run a head together, if it has a price: those of the last stage's forwards."""
    last = packed.schedule.stages - 1
    if not costs.head:
        return frozenset()
    places = (zip(actions, ticks, strict=True) for actions, ticks in packed.timed)
    return frozenset(tick for row in places for a, tick in row if a.phase == "F" and a.stage == last)


def lanes_that_send(packed: Packed) -> list[list[bool]]:
    """``[tick][lane]``: whether any device's F or backward lane sends to another device."""
    schedule = packed.schedule
    ends = range(schedule.stages - 1)
    leaves = [schedule.device_of(s) != schedule.device_of(s + 1) for s in ends] + [False]
    # [1] By phase, the lane and the stages whose result goes to another device.
    senders = {"F": (0, leaves), "B": (1, [False, *leaves]), "I": (1, [False, *leaves])}
    sends = [[False, False] for _ in range(packed.ticks)]
    for actions, ticks in packed.timed:
        for a, tick in zip(actions, ticks, strict=True):
            if a.phase != "W":
                lane, leaving = senders[a.phase]
                if leaving[a.stage]:
                    sends[tick][lane] = True
    return sends
