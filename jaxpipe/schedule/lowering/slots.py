"""Which buffer every value rests in: lifetimes and interval colouring.

Every value that outlives a lane gets a slot of its kind for exactly the ticks in which it is alive on its device:

    activation       a stage's input            from its arrival (stage 0: its forward) to its B or W
    residual         what the backward needs    from the forward to its B or W; none where a stage keeps none
    gradient         a stage's output gradient  from its arrival (last stage: its forward) to its B or I
    weight_residual  what W needs besides       from its I to its W

Input and residual rest until W so that I need not copy what W shares with it. Slots are given out by interval
colouring, so there are exactly as many as values that live at once.
"""

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

from jaxpipe.schedule.ir import Phase
from jaxpipe.schedule.lowering.pack import Packed

Interval = tuple[int, int, tuple[int, int]]
"""(first tick, last tick, (stage, microbatch)) of a value, both ticks included."""

KINDS = ("activation", "residual", "gradient", "weight_residual")

Ticks = dict[Phase, list[list[int]]]
"""``ticks[phase][stage][microbatch]``: when an action runs; -1 where there is none."""


def action_ticks(packed: Packed) -> Ticks:
    """The ticks of all actions as plain lists."""
    schedule = packed.schedule
    phases: tuple[Phase, ...] = ("F", "B", "I", "W")
    ticks: Ticks = {phase: [[-1] * schedule.microbatches for _ in range(schedule.stages)] for phase in phases}
    for row, times in packed.timed:
        for action, tick in zip(row, times, strict=True):
            ticks[action.phase][action.stage][action.microbatch] = tick
    return ticks


def lifetimes(
    packed: Packed, ticks: Ticks, device: int, keeps: Sequence[bool] | None = None, given: bool = False
) -> dict[str, list[Interval]]:
    """The values that rest on a device, by kind, each with its first and last tick.

    Args:
        packed: Actions in ticks.
        ticks: Of the same.
        device: Whose values.
        keeps: Per stage, whether it keeps residuals beside its input; by default all do.
        given: The gradient of what leaves the last stage is there when it is wanted, and not made by its forward.
    """
    schedule = packed.schedule
    last = schedule.stages - 1
    live: dict[str, list[Interval]] = {kind: [] for kind in KINDS}

    def gradient_tick(stage: int, m: int) -> int:
        return max(ticks["B"][stage][m], ticks["I"][stage][m])

    for repeat in range(schedule.repeats):
        s = schedule.stage_at(device, repeat)
        for m in range(schedule.microbatches):
            value, now = (s, m), ticks["F"][s][m]
            arrival = ticks["F"][s - 1][m] + 1 if s > 0 else now
            used = gradient_tick(s, m)
            live["activation"].append((arrival, max(now, used, ticks["W"][s][m]), value))
            if used < 0:
                continue
            if keeps is None or keeps[s]:
                live["residual"].append((now, max(used, ticks["W"][s][m]), value))
            made = used if given else now
            live["gradient"].append((gradient_tick(s + 1, m) + 1 if s < last else made, used, value))
            if ticks["W"][s][m] >= 0:
                live["weight_residual"].append((ticks["I"][s][m], ticks["W"][s][m], value))
    return live


def colour(intervals: Iterable[Interval]) -> tuple[dict[tuple[int, int], int], int]:
    """Gives each value a slot that no value alive in a common tick has; uses as few slots as possible.

    Args:
        intervals: Values with the first and last tick of their lives.

    Returns:
        The slot of each value, and the number of slots: the most values alive in one tick.

    Example:
        >>> colour([(0, 2, (0, 0)), (1, 3, (0, 1)), (3, 4, (0, 2))])
        ({(0, 0): 0, (0, 1): 1, (0, 2): 0}, 2)
    """
    slot: dict[tuple[int, int], int] = {}
    free: list[int] = []
    busy: list[tuple[int, int]] = []
    used = 0
    for start, end, value in sorted(intervals):
        while busy and busy[0][0] < start:
            heappush(free, heappop(busy)[1])
        if free:
            slot[value] = heappop(free)
        else:
            slot[value], used = used, used + 1
        heappush(busy, (end, slot[value]))
    return slot, used
