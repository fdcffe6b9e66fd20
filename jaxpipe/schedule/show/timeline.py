"""What every picture draws: actions and hops with their times, and the numbers beside them.

Pictures differ in how they draw; what they draw is decided here, once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from jaxpipe.schedule.costs import Costs
from jaxpipe.schedule.forms.grids import tick_actions, title
from jaxpipe.schedule.ir import Action, Schedule
from jaxpipe.schedule.rules import writes
from jaxpipe.schedule.simulate import Interval, Runtime, Timing, simulate

if TYPE_CHECKING:
    from jaxpipe.schedule.lowering.lower import TickTable

FILL = {"F": "#0b4f8a", "B": "#e69f00", "I": "#f2d45c", "W": "#009e73"}
"""Four steps of lightness, so that they stay apart in grey print, in hues that stay apart for colour-blind readers
(after Okabe and Ito 2008)."""

INK = {"F": "#ffffff", "B": "#000000", "I": "#000000", "W": "#ffffff"}
"""Colour of what is written on a fill."""

PHASE_NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}


class Hop(NamedTuple):
    """A transfer from one device to another, and the action whose outcome it carries."""

    start: float
    end: float
    sender: int
    receiver: int
    action: Action


@dataclass(frozen=True)
class Timeline:
    """A schedule with times, ready to be drawn.

    Attributes:
        schedule: The order that runs.
        busy: ``busy[d]``: device d's actions with their times.
        hops: The transfers, if a hop takes any time.
        length: Makespan, in the costs' unit.
        bubble: Idle share of the makespan.
        span_bubble: Idle share of the longest span of one device.
        peaks: Per device, activations kept at once in units of what a microbatch leaves on a full device.
        note: Runtime and costs, for the caption.
        heading: What it is, where several show the same schedule.
    """

    schedule: Schedule
    busy: tuple[tuple[Interval, ...], ...] = field(repr=False)
    hops: tuple[Hop, ...] = field(repr=False)
    length: float
    bubble: float
    span_bubble: float
    peaks: tuple[float, ...]
    note: str
    heading: str = ""

    @property
    def title(self) -> str:
        """Name and shape."""
        return f"{self.heading}: {title(self.schedule)}" if self.heading else title(self.schedule)

    @property
    def caption(self) -> str:
        """The numbers, in one line."""
        return (
            f"makespan {self.length:.6g}, bubble {self.bubble:.1%}, span bubble {abs(self.span_bubble):.1%}, "
            f"peak {max(self.peaks):.4g} A; {self.note}"
        )


Drawable: TypeAlias = "Schedule | TickTable | Timeline"


def timeline(what: Drawable, costs: Costs | None = None, runtime: Runtime = "async") -> Timeline:
    """Gives times to a schedule.

    Args:
        what: A schedule; a tick table, whose ticks then follow each other, each as long as its slowest device; or a
            timeline, which is returned as it is.
        costs: Times of the phases, by default 1 each.
        runtime: Of a schedule, as in `simulate`.

    Returns:
        The `Timeline`.
    """
    costs = costs or Costs()
    if isinstance(what, Timeline):
        return what
    if isinstance(what, Schedule):
        timing = simulate(what, costs, runtime)
        length, bubble, span_bubble = timing.makespan, timing.bubble, timing.span_bubble
        schedule, busy, peaks, note = what, timing.busy, timing.peak_activations, f"{runtime}, {_prices(costs)}"
    else:
        schedule, (busy, heads) = what.schedule, _tick_times(what, costs)
        length, bubble, span_bubble = _shares(busy, heads)
        peaks = simulate(schedule, costs).peak_activations
        note = f"{what.ticks} ticks, {what.packing} packing, {_prices(costs)}"
    return Timeline(schedule, busy, _hops(schedule, busy, costs), length, bubble, span_bubble, peaks, note)


def timed(schedule: Schedule, timing: Timing, note: str, heading: str = "") -> Timeline:
    """The timeline of times that are known already, in any unit.

    Args:
        schedule: What ran.
        timing: When.
        note: What to say of it in the caption, the unit for one.
        heading: What stands before the name.
    """
    numbers = timing.makespan, timing.bubble, timing.span_bubble, timing.peak_activations
    return Timeline(schedule, timing.busy, (), *numbers, note, heading)


def timelines(
    what: "Drawable | Sequence[Drawable]", costs: Costs | None = None, runtime: Runtime = "async"
) -> list[Timeline]:
    """One timeline for each of a list, or of a single schedule."""
    several = what if isinstance(what, Sequence) else [what]
    return [timeline(one, costs, runtime) for one in several]


def hop_count(schedule: Schedule) -> int:
    """How many transfers between devices one step makes."""
    return sum(len(_receivers(schedule, action)) for actions in schedule.order for action in actions)


def axis_step(length: float, marks: int) -> float:
    """The distance of about so many marks on a time axis: 1, 2 or 5 times a power of ten.

    Example:
        >>> axis_step(33, 10), axis_step(0.7, 10)
        (5.0, 0.1)
    """
    rough = max(length, 1e-12) / marks
    power = 1e-15
    while power * 10 <= rough:
        power *= 10
    return next(float(f"{power * factor:.6g}") for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)


def _receivers(schedule: Schedule, action: Action) -> list[int]:
    """The other device that reads what an action writes, if there is one."""
    home = schedule.device_of(action.stage)
    values = writes(action, schedule.stages)
    return [to for value in values if (to := schedule.device_of(value.stage)) != home and value.kind in "xg"]


def _hops(schedule: Schedule, busy: Sequence[Sequence[Interval]], costs: Costs) -> tuple[Hop, ...]:
    if not costs.hop:
        return ()
    return tuple(
        Hop(end, end + costs.hop, device, receiver, action)
        for device, row in enumerate(busy)
        for _, end, action in row
        for receiver in _receivers(schedule, action)
    )


def _tick_times(table: "TickTable", costs: Costs) -> tuple[tuple[tuple[Interval, ...], ...], float]:
    """Ticks one after the other; the lanes of a tick stand side by side, each in the same place on every device.

    Heads that all devices run stand between F and the backward lane; the second result is the time of all of them.
    """
    schedule = table.schedule
    busy: list[list[Interval]] = [[] for _ in range(schedule.devices)]
    now = spent = 0.0
    for tick, row in enumerate(tick_actions(table)):
        head = costs.head * (table.columns["h_microbatch"][tick][0] >= 0)
        together = head > 0 or any(len(actions) > 1 for actions in row)
        lanes = ("F", "BI", "W") if together else ("FBIW",)
        for lane in lanes:
            spans = [
                (device, action, costs.of(action, schedule))
                for device, actions in enumerate(row)
                for action in actions
                if action.phase in lane
            ]
            for device, action, span in spans:
                busy[device].append(Interval(now, now + span, action))
            now += max((span for _, _, span in spans), default=0.0) + head * (lane == "F")
        spent += head
    return tuple(map(tuple, busy)), spent


def _shares(busy: Sequence[Sequence[Interval]], heads: float) -> tuple[float, float, float]:
    work = sum(end - start for row in busy for start, end, _ in row) + len(busy) * heads
    length = max(row[-1].end for row in busy) - min(row[0].start for row in busy)
    span = max(row[-1].end - row[0].start for row in busy)
    return length, _idle_share(work, len(busy) * length), _idle_share(work, len(busy) * span)


def _idle_share(work: float, available: float) -> float:
    return 1 - work / available if available else 0.0


def _prices(costs: Costs) -> str:
    names = {
        "forward": "tF",
        "backward_input": "tI",
        "backward_weight": "tW",
        "recompute": "recompute",
        "hop": "hop",
        "head": "head",
    }
    shown = []
    for attribute, name in names.items():
        value = getattr(costs, attribute)
        if isinstance(value, Sequence):
            shown.append(f"{name} by stage" if len(value) > 4 else f"{name} {'/'.join(f'{v:g}' for v in value)}")
        elif value or attribute not in ("recompute", "head"):
            shown.append(f"{name} {value:g}")
    return ", ".join(shown)
