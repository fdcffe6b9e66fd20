"""From an order to ticks: when each action runs in the compiled loop.

A tick has three lanes, run in this order: F, then B or I, then W. What a lane sends arrives before the same lane of the
next tick, so a value that crosses devices is read in a later tick than it was written; on one device a later lane may
read what an earlier lane of the same tick wrote.
"""

from dataclasses import dataclass
from typing import Literal

from jaxpipe.schedule.costs import Costs
from jaxpipe.schedule.ir import Action, Schedule
from jaxpipe.schedule.rules import Value, reads, run_order, writes

Packing = Literal["paired", "single"]

LANE = {"F": 0, "B": 1, "I": 1, "W": 2}


@dataclass(frozen=True)
class Packed:
    """A schedule with a tick for every action.

    Attributes:
        schedule: The order that was packed.
        packing: ``single`` (one action per tick and device) or ``paired`` (one per lane).
        tick: The tick of each action.
        advanced: Whether forwards were moved ahead of the schedule's own order to hide hops.
    """

    schedule: Schedule
    packing: Packing
    tick: dict[Action, int]
    advanced: bool = False

    @property
    def ticks(self) -> int:
        """How many ticks the loop has."""
        return max(self.tick.values()) + 1

    def peak_stages(self) -> list[int]:
        """Per device, the most stage inputs alive in one tick, from a forward to the action that frees them."""
        freed = "W" if "W" in self.schedule.phases else "B"
        peaks = []
        for actions in self.schedule.order:
            change = [0] * (self.ticks + 1)
            for a in actions:
                if a.phase == "F":
                    change[self.tick[a]] += 1
                elif a.phase == freed:
                    change[self.tick[a] + 1] -= 1
            alive = peak = 0
            for delta in change:
                alive += delta
                peak = max(peak, alive)
            peaks.append(peak)
        return peaks


def pack(schedule: Schedule, packing: Packing, advance: bool = False) -> Packed:
    """Puts every action in the earliest tick that order and hops allow.

    Args:
        schedule: A verified schedule.
        packing: ``single`` or ``paired``.
        advance: First move forwards ahead, see `advance_forwards`.
    """
    ordered = advance_forwards(schedule) if advance else schedule
    tick: dict[Action, int] = {}
    written: dict[Value, tuple[int, int, int]] = {}
    last: list[Action | None] = [None] * ordered.devices
    for device, action in run_order(ordered):
        lane, earliest, before = LANE[action.phase], 0, last[device]
        if before is not None:
            shares = packing == "paired" and LANE[before.phase] < lane
            earliest = tick[before] + (0 if shares else 1)
        for value in reads(action, ordered.stages):
            when, writer, writer_lane = written[value]
            same_tick = writer == device and writer_lane < lane
            earliest = max(earliest, when if same_tick else when + 1)
        tick[action] = earliest
        last[device] = action
        for value in writes(action, ordered.stages):
            written[value] = (earliest, device, lane)
    return Packed(ordered, packing, tick, advanced=advance and ordered.order != schedule.order)


def advance_forwards(schedule: Schedule) -> Schedule:
    """Moves each forward of device i ahead of up to P-1-i backwards.

    In a loop of ticks a hop takes a tick of its own lane. The way to the last device and back is then one tick each way
    longer per device than 1F1B's order foresees, and this many forwards more in flight keep both lanes full. 1F1B
    becomes eager 1F1B. The order of the forwards among themselves, and of the backwards, stays.
    """
    rows = []
    for device, actions in enumerate(schedule.order):
        places, backwards = [], 0
        for action in actions:
            ahead = schedule.devices - 1 - device if action.phase == "F" else 0
            places.append((max(0, backwards - ahead), action.phase != "F"))
            backwards += action.phase in "BI"
        rows.append(tuple(a for _, a in sorted(zip(places, actions, strict=True), key=lambda entry: entry[0])))
    return Schedule(
        schedule.name,
        schedule.devices,
        schedule.microbatches,
        schedule.repeats,
        schedule.placement,
        tuple(rows),
    )


def lockstep_makespan(packed: Packed, costs: Costs) -> float:
    """Time when every tick waits for its slowest device.

    A hop hides behind the other lane of its tick: what F sends flies while the backward lane works, and what the
    backward lane sends flies while the next tick's F lane works. A lane with nothing to do exposes it.
    """
    schedule = packed.schedule
    work: list[dict[int, list[float]]] = [{} for _ in range(packed.ticks)]
    sends = [[False, False] for _ in range(packed.ticks + 1)]
    for device, actions in enumerate(schedule.order):
        for action in actions:
            tick, lane = packed.tick[action], LANE[action.phase]
            lanes = work[tick].setdefault(device, [0.0, 0.0])
            lanes[min(lane, 1)] += costs.of(action, schedule)
            if lane < 2 and _hops(action, schedule):
                # [1] F's hop flies during this tick's backward lane, the backward's during the next tick's F lane.
                sends[tick if lane == 0 else tick + 1][1 - lane] = True
    total = 0.0
    for lanes_of, (forward_lane_hop, backward_lane_hop) in zip(work, sends, strict=False):
        floor = (costs.hop * forward_lane_hop, costs.hop * backward_lane_hop)
        total += max((max(f, floor[0]) + max(b, floor[1]) for f, b in lanes_of.values()), default=sum(floor))
    return total


def _hops(action: Action, schedule: Schedule) -> bool:
    to = action.stage + (1 if action.phase == "F" else -1)
    return 0 <= to < schedule.stages and schedule.device_of(to) != schedule.device_of(action.stage)
