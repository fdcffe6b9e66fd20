"""What a simulation finds: when every action runs, and what follows: bubbles, memory and the critical path."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxpipe.schedule.ir import Action, Schedule

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
        heads: (start, end) of each head that all devices run together, busy all of them; none under ``async``.
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


def timing_of(
    schedule: Schedule, busy: list[list[Interval]], waited_for: dict[Action, Action], heads: Heads, after: float
) -> Timing:
    """Sums up a run.

    Args:
        schedule: What ran.
        busy: Per device its intervals.
        waited_for: Which action each one waited for.
        heads: Heads that all devices ran together.
        after: Share of a microbatch's activations that is kept from I to its W.
    """
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


def _gaps(row: Sequence[Interval], heads: Heads, end: float) -> tuple[tuple[float, float], ...]:
    """The idle times before, between and after a device's actions and the heads."""
    spans = sorted([interval[:2] for interval in row] + list(heads))
    ends = [0.0, *(stop for _, stop in spans)]
    starts = [*(start for start, _ in spans), end]
    return tuple((a, b) for a, b in zip(ends, starts, strict=True) if b > a)
