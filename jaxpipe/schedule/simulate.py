"""How long a schedule takes and what it keeps, for given costs and a given runtime. No device is needed.

Three runtimes:

    async            every device runs its own program: an action starts when its inputs have arrived and its device is
                     free. The lower limit, and what the published formulas describe.
    lockstep         the compiled loop with a global wait: a tick lasts as long as its slowest device's.
    lockstep_local   the compiled loop with each lane waiting on its own: F for the F lanes of the last tick, B, I and W
                     for the backward lanes. A device may run ahead in one lane while it waits in the other.

The lockstep runtimes run what `lower` makes of the schedule for the same costs. It may move actions to hide hops;
memory is then that of the moved order.

A vocab-parallel head (`Costs.head`) is run by all devices together, once per microbatch:

    lockstep, lockstep_local   in the ticks of the last stage's forwards all devices meet after their F lane, then spend
                               the head, then go on. It counts as work of every device (`Timing.heads`).
    async                      it is charged to the last stage's forward: nobody else waits for it but for its result. A
                               lower limit, as everything under this runtime.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from jaxpipe.errors import ScheduleError
from jaxpipe.schedule.costs import Costs
from jaxpipe.schedule.ir import Action, Schedule
from jaxpipe.schedule.lower import choose
from jaxpipe.schedule.pack import Packed, Packing, head_ticks, lanes_that_send
from jaxpipe.schedule.rules import Value, reads, writes

Runtime = Literal["async", "lockstep", "lockstep_local"]


Heads = tuple[tuple[float, float], ...]
"""(start, end) of each head that all devices run together."""


class Interval(NamedTuple):
    """When a device runs an action."""

    start: float
    end: float
    action: Action


@dataclass(frozen=True)
class Timing:
    """What `simulate` found.

    Attributes:
        makespan: First start to last end over all devices: what a synchronised optimizer step pays.
        bubble: Share of device time spent idle, 1 - busy/(P·makespan).
        span_bubble: The same with the longest span of one device, from its own first start to its own last end, in
            place of the makespan: what the zero-bubble papers report. Never mix the two.
        peak_activations: Per device, the most activations kept at once, in units of what one microbatch leaves on a
            full device.
        critical_path: Actions that each waited for the one before them, from the start to the end of the makespan.
        busy: ``busy[d]``: device d's actions with their times, in the order in which they run.
        heads: (start, end) of each head that all devices run together; none under ``async``.
    """

    makespan: float
    bubble: float
    span_bubble: float
    peak_activations: tuple[float, ...]
    critical_path: tuple[Action, ...] = field(repr=False)
    busy: tuple[tuple[Interval, ...], ...] = field(repr=False)
    heads: Heads = field(default=(), repr=False)

    @property
    def idle(self) -> tuple[tuple[tuple[float, float], ...], ...]:
        """``idle[d]``: (start, end) of device d's idle times, between 0 and the makespan."""
        return tuple(_gaps(row, self.heads, self.makespan) for row in self.busy)

    @property
    def bubble_time(self) -> float:
        """Mean idle time per device, in the costs' unit."""
        return self.bubble * self.makespan


def simulate(
    schedule: Schedule,
    costs: Costs | None = None,
    runtime: Runtime = "async",
    *,
    packing: Literal["auto"] | Packing = "auto",
    memory: Literal["ideal", "strict"] = "ideal",
    blocking_hops: bool = False,
    after_input: float = 1.0,
) -> Timing:
    """Runs a schedule on paper.

    Args:
        schedule: A verified schedule.
        costs: Times of the phases, by default 1 each; in any unit, which is the unit of the result.
        runtime: ``async``, ``lockstep`` or ``lockstep_local``, see above.
        packing: How the lockstep runtimes share ticks, as in `lower`.
        memory: Whether the lockstep runtimes may move actions and keep more, as in `lower`.
        blocking_hops: Under ``async``, a hop occupies its sender (it is idle then, but may not go on).
        after_input: Share of a microbatch's activations that is kept from I to its W.

    Returns:
        Times, bubbles, memory and the critical path.

    Raises:
        ScheduleError: An option has an unknown value.

    Example:
        >>> from jaxpipe.schedule import build
        >>> timing = simulate(build("1f1b", devices=4, microbatches=8))
        >>> timing.makespan, round(timing.bubble, 3), timing.peak_activations
        (33.0, 0.273, (4.0, 3.0, 2.0, 1.0))
    """
    costs = costs or Costs()
    if runtime not in ("async", "lockstep", "lockstep_local"):
        raise ScheduleError(f"runtime={runtime!r} must be 'async', 'lockstep' or 'lockstep_local'; try 'async'")
    if packing not in ("auto", "paired", "single"):
        raise ScheduleError(f"packing={packing!r} must be 'auto', 'paired' or 'single'; try 'auto'")
    if memory not in ("ideal", "strict"):
        raise ScheduleError(f"memory={memory!r} must be 'ideal' or 'strict'; try 'ideal'")
    if not 0 <= after_input <= 1:
        raise ScheduleError(f"after_input={after_input} must be between 0 and 1; try 1")
    if runtime == "async":
        return _timing(schedule, *_asynchronous(schedule, costs, blocking_hops), after_input)
    packed = choose(schedule, packing, costs, memory)
    return _timing(packed.schedule, *_lanes(packed, costs, runtime == "lockstep_local"), after_input)


def _timing(
    schedule: Schedule, busy: list[list[Interval]], waited_for: dict[Action, Action], heads: Heads, after: float
) -> Timing:
    latest = heads[-1][1] if heads else 0.0
    ends = [max(row[-1].end, latest) for row in busy]
    spans = [end - row[0].start for end, row in zip(ends, busy, strict=True)]
    makespan = max(ends) - min(row[0].start for row in busy)
    work = sum(end - start for row in busy for start, end, _ in row)
    work += schedule.devices * sum(end - start for start, end in heads)
    path = [max((row[-1] for row in busy), key=lambda interval: interval.end).action]
    while path[-1] in waited_for:
        path.append(waited_for[path[-1]])
    return Timing(
        makespan=makespan,
        bubble=_share(work, schedule.devices * makespan),
        span_bubble=_share(work, schedule.devices * max(spans)),
        peak_activations=tuple(_peak(actions, after) / schedule.repeats for actions in schedule.order),
        critical_path=tuple(reversed(path)),
        busy=tuple(map(tuple, busy)),
        heads=heads,
    )


def _share(work: float, available: float) -> float:
    return 1 - work / available if available else 0.0


def _peak(actions: Sequence[Action], after_input: float) -> float:
    """Most stage activations kept: F opens, B or W closes, I leaves `after_input` of them."""
    change = {"F": 1.0, "B": -1.0, "I": after_input - 1.0, "W": -after_input}
    if all(action.phase == "F" for action in actions):
        return 1.0  # forward only: closed as soon as it ends
    kept = peak = 0.0
    for action in actions:
        kept += change[action.phase]
        peak = max(peak, kept)
    return round(peak, 9)


def _asynchronous(
    schedule: Schedule, costs: Costs, blocking: bool
) -> tuple[list[list[Interval]], dict[Action, Action], Heads]:
    """Each action as early as its inputs and its device allow, and which action each one waited for."""
    price, stages = _prices(schedule, costs), schedule.stages
    price[stages - 1, "F"] += costs.head
    owner = [schedule.device_of(stage) for stage in range(stages)]
    arrives: dict[Value, tuple[float, Action]] = {}
    free = [0.0] * schedule.devices
    busy: list[list[Interval]] = [[] for _ in schedule.order]
    waited_for: dict[Action, Action] = {}
    left = sum(map(len, schedule.order))
    while left:
        before = left
        for device, (actions, row) in enumerate(zip(schedule.order, busy, strict=True)):
            while len(row) < len(actions):
                action = actions[len(row)]
                inputs = [arrives.get(value) for value in reads(action, stages)]
                if None in inputs:
                    break
                start, cause = free[device], row[-1].action if row else None
                for when, maker in filter(None, inputs):
                    if when > start:
                        start, cause = when, maker
                if cause is not None:
                    waited_for[action] = cause
                end = free[device] = start + price[action.stage, action.phase]
                row.append(Interval(start, end, action))
                for value in writes(action, stages):
                    leaves = owner[value.stage] != device
                    arrives[value] = (end + costs.hop * leaves, action)
                    if leaves and blocking:
                        free[device] = end + costs.hop
                left -= 1
        if left == before:
            raise ScheduleError("the devices wait for each other in a circle; `verify` shows where")
    return busy, waited_for, ()


def _prices(schedule: Schedule, costs: Costs) -> dict[tuple[int, str], float]:
    return {
        (stage, phase): costs.of(Action(stage, phase, 0), schedule)
        for stage in range(schedule.stages)
        for phase in schedule.phases
    }


class _Moment(NamedTuple):
    """A time, and the action that ended then (None at the start)."""

    time: float
    action: Action | None


def _lanes(packed: Packed, costs: Costs, local: bool) -> tuple[list[list[Interval]], dict[Action, Action], Heads]:
    """The actions of every tick at their times, by the models that `pack` prices."""
    schedule = packed.schedule
    price, sends = _prices(schedule, costs), lanes_that_send(packed)
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


def _gaps(row: Sequence[Interval], heads: Heads, end: float) -> tuple[tuple[float, float], ...]:
    """The idle times before, between and after a device's actions and the heads."""
    spans = sorted([interval[:2] for interval in row] + list(heads))
    ends = [0.0, *(stop for _, stop in spans)]
    starts = [*(start for start, _ in spans), end]
    return tuple((a, b) for a, b in zip(ends, starts, strict=True) if b > a)
