"""From an order to ticks: when each action runs in the compiled loop.

A tick has three lanes, run in this order: F, then B or I, then W. What a lane sends arrives before the same lane of the
next tick, so a value that crosses devices is read in a later tick than it was written; on one device a later lane may
read what an earlier lane of the same tick wrote.

Which actions of a device share a tick is a choice (`Sharing`), and fewer ticks are not always faster: a tick lasts as
long as its slowest device's. `packings` yields the choices, `lockstep` prices them.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from jaxpipe.schedule.ir import Action, Schedule
from jaxpipe.schedule.rules import Deadlock, Value, reads, writes

Packing = Literal["paired", "single"]

Sharing = Literal["none", "all", "weights_alone", "weights_held"]
"""Which actions may share a tick.

    none            one action per tick
    all             one per lane, whatever follows in the order
    weights_alone   F and B or I share, W has ticks of its own
    weights_held    one per lane, but no W before every device has reached its first B or I: from then on each tick
                    holds F, I and W on all devices, whatever the ratio of their times
"""

LANE = {"F": 0, "B": 1, "I": 1, "W": 2}

Rows = list[list[int]]


@dataclass(frozen=True)
class Packed:
    """A schedule with a tick for every action.

    Example:
        >>> from jaxpipe.schedule import build
        >>> packed = pack(build("gpipe", devices=2, microbatches=1), "single")
        >>> packed.rows, packed.tick[Action(1, "B", 0)]
        (([0, 3], [1, 2]), 2)

    Attributes:
        schedule: The order that runs: the given one, unless `advanced` or sharing ``weights_held`` moved actions.
        packing: ``single`` (one action per tick and device) or ``paired`` (one per lane).
        rows: Per device, the ticks of its actions in the schedule's order.
        advanced: Whether forwards were moved ahead of the schedule's own order to hide hops.
        sharing: Which actions share ticks.
    """

    schedule: Schedule
    packing: Packing
    rows: tuple[list[int], ...] = field(repr=False)
    advanced: bool = False
    sharing: Sharing = "none"

    @cached_property
    def tick(self) -> dict[Action, int]:
        """The tick of each action."""
        return {a: tick for actions, ticks in self.timed for a, tick in zip(actions, ticks, strict=True)}

    @property
    def timed(self) -> Iterator[tuple[tuple[Action, ...], list[int]]]:
        """Per device its actions and their ticks."""
        return zip(self.schedule.order, self.rows, strict=True)

    @cached_property
    def ticks(self) -> int:
        """How many ticks the loop has."""
        return max(map(max, self.rows)) + 1

    def peak_stages(self) -> list[int]:
        """Per device, the most stage inputs alive in one tick, from a forward to the action that frees them."""
        return [_peak(actions, ticks) for actions, ticks in self.timed]


def order_peak(schedule: Schedule) -> list[int]:
    """Per device, the most stage inputs that the order itself keeps, from a forward to the action that frees them."""
    return [_peak(actions, range(len(actions))) for actions in schedule.order]


def _peak(actions: Sequence[Action], times: Sequence[int]) -> int:
    """The most stage inputs alive at one time; an action holds its input during its own."""
    change = [0] * (max(times, default=0) + 2)
    frees = "BW" if any(a.phase != "F" for a in actions) else "F"
    for a, time in zip(actions, times, strict=True):
        if a.phase == "F":
            change[time] += 1
        if a.phase in frees:
            change[time + 1] -= 1
    alive = peak = 0
    for delta in change:
        alive += delta
        peak = max(peak, alive)
    return peak


@dataclass(frozen=True)
class _Numbered:
    """A schedule's actions by number, so that packing it several times hashes nothing.

    Attributes:
        schedule: The schedule.
        actions: All actions.
        lane: The lane of each.
        inputs: The actions whose values each reads.
        waits: Those of them that must have run in an earlier tick.
        rows: Numbers in the schedule's order.
    """

    schedule: Schedule
    actions: list[Action]
    lane: list[int]
    inputs: list[list[int]]
    waits: list[list[int]]
    rows: Rows

    @cached_property
    def advanced(self) -> Rows:
        """The order with each forward of device i ahead of up to P-1-i backwards.

        In a loop of ticks a hop takes a tick of its own lane. The way to the last device and back is then one tick each
        way longer per device than 1F1B's order foresees, and this many forwards more in flight keep both lanes full.
        1F1B becomes eager 1F1B. The order of the forwards among themselves, and of the backwards, stays.
        """
        rows = []
        for device, row in enumerate(self.rows):
            places, backwards = {}, 0
            for n in row:
                ahead = len(self.rows) - 1 - device if self.lane[n] == 0 else 0
                places[n] = (max(0, backwards - ahead), self.lane[n] > 0)
                backwards += self.lane[n] == 1
            rows.append(sorted(row, key=places.__getitem__))
        return rows


def _number(schedule: Schedule) -> _Numbered:
    actions = [a for row in schedule.order for a in row]
    writer: dict[Value, int] = {value: n for n, a in enumerate(actions) for value in writes(a, schedule.stages)}
    rows, first = [], 0
    for row in schedule.order:
        rows.append(list(range(first, first + len(row))))
        first += len(row)
    device = [device for device, row in enumerate(rows) for _ in row]
    lane = [LANE[a.phase] for a in actions]
    inputs = [[writer[value] for value in reads(a, schedule.stages)] for a in actions]
    # [1] What an earlier lane of the same device makes may be read in the same tick, which the order alone ensures.
    waits = [
        [source for source in sources if device[source] != device[n] or lane[source] >= lane[n] or source > n]
        for n, sources in enumerate(inputs)
    ]
    return _Numbered(schedule, actions, lane, inputs, waits, rows)


def pack(schedule: Schedule, packing: Packing, advance: bool = False, sharing: Sharing | None = None) -> Packed:
    """Puts every action in the earliest tick that order, hops and sharing allow.

    Args:
        schedule: A verified schedule.
        packing: ``single`` or ``paired``.
        advance: First move each forward of device i ahead of up to P-1-i backwards, which hides hops.
        sharing: How actions share paired ticks; by default ``all``.

    Raises:
        Deadlock: The moved order cannot run.
    """
    return _pack(_number(schedule), packing, advance, "none" if packing == "single" else sharing or "all")


def packings(schedule: Schedule, packing: Literal["auto"] | Packing, advance: bool = True) -> Iterator[Packed]:
    """Every way of packing a schedule that is worth a price.

    Args:
        schedule: A verified schedule.
        packing: ``single``, ``paired`` or ``auto`` for both.
        advance: Whether actions may leave the schedule's own order.
    """
    numbered = _number(schedule)
    if packing in ("auto", "single"):
        yield _pack(numbered, "single", False, "none")
    if packing not in ("auto", "paired"):
        return
    sharings: tuple[Sharing, ...] = ("all", "weights_alone") if "W" in schedule.phases else ("all",)
    for sharing in sharings:
        yield _pack(numbered, "paired", False, sharing)
    if not advance or schedule.phases == {"F"}:
        return
    if "W" in schedule.phases:
        yield _pack(numbered, "paired", False, "weights_held")
        sharings = (*sharings, "weights_held")
    if schedule.placement == "loop":
        for sharing in sharings:
            with suppress(Deadlock):  # not every order leaves room for it
                yield _pack(numbered, "paired", True, sharing)


def _pack(numbered: _Numbered, packing: Packing, advance: bool, sharing: Sharing) -> Packed:
    rows = numbered.advanced if advance else numbered.rows
    if sharing == "weights_held":
        tick = _held(numbered, rows)
        rows = [sorted(row, key=lambda n: (tick[n], numbered.lane[n])) for row in rows]
    else:
        tick = _earliest(numbered, rows, sharing)
    schedule, actions = numbered.schedule, numbered.actions
    if rows != numbered.rows:
        schedule = replace(schedule, order=tuple(tuple(actions[n] for n in row) for row in rows))
    ticks = tuple([tick[n] for n in row] for row in rows)
    return Packed(schedule, packing, ticks, advanced=advance and rows != numbered.rows, sharing=sharing)


def _earliest(numbered: _Numbered, rows: Rows, sharing: Sharing) -> list[int]:
    """The tick of each action, by number; -1 for actions that `rows` leaves out."""
    lane, waits = numbered.lane, numbered.waits
    # [1] shares[a][b]: whether lane b may join the tick whose last action ran in lane a.
    shares = [
        [sharing != "none" and a < b and (sharing != "weights_alone" or b < 2) for b in range(3)] for a in range(3)
    ]
    tick = [-1] * len(lane)
    # [2] Per device how many actions have run, and tick and lane of the last: at first one before all, shared by none.
    done, at = [0] * len(rows), [(-1, 2)] * len(rows)
    left = sum(map(len, rows))
    while left:
        before = left
        for d, row in enumerate(rows):
            start = stop = done[d]
            now, previous = at[d]
            for stop in range(start, len(row)):
                n = row[stop]
                mine = lane[n]
                earliest = now if shares[previous][mine] else now + 1
                for source in waits[n]:
                    when = tick[source]
                    if when < 0:
                        break
                    if when >= earliest:
                        earliest = when + 1
                else:
                    tick[n] = now = earliest
                    previous = mine
                    continue
                break
            else:
                stop = len(row)
            done[d], at[d] = stop, (now, previous)
            left -= stop - start
        if left == before:
            raise Deadlock(done)
    return tick


def _held(numbered: _Numbered, rows: Rows) -> list[int]:
    """Ticks with every W put off until all devices run backwards, then one per tick in order."""
    lane = numbered.lane
    tick = _earliest(numbered, [[n for n in row if lane[n] < 2] for row in rows], "all")
    first = max(min((tick[n] for n in row if lane[n] == 1), default=0) for row in rows)
    for row in rows:
        free = first
        for n in row:
            if lane[n] == 2:
                tick[n] = max(free, *(tick[source] for source in numbered.inputs[n]))
                free = tick[n] + 1
    return tick
