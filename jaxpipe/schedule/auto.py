"""`auto`: the fastest schedule for given costs and a memory limit, from the catalogue or from a search.

The search is list scheduling (`greedy`) under a handful of policies. It pays where the catalogue's families assume what
does not hold: stages of different cost (a heavy head, a light first stage), hops that take time, memory between two
families' needs. It is never worse than the best entry of the catalogue that fits, because that one is returned then.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

from jaxpipe.errors import ScheduleError
from jaxpipe.schedule.catalog import CATALOG, entry
from jaxpipe.schedule.costs import Costs
from jaxpipe.schedule.families.craft.greedy import Policy, list_schedule
from jaxpipe.schedule.ir import Placement, Schedule
from jaxpipe.schedule.simulate import Runtime, Timing, simulate
from jaxpipe.schedule.verify import verify

TRIED_REPEATS = (1, 2)
"""Repeats that are tried when none are given."""


@dataclass(frozen=True)
class Choice:
    """What `auto` chose.

    Attributes:
        schedule: The schedule; its name is ``auto`` if it was searched, else that of the catalogue.
        timing: Its times and memory, for the costs and runtime given.
        reason: Why this one: one line.
        memory: What to give to `lower`: ``strict`` where only the schedule's own order fits the limit.
    """

    schedule: Schedule
    timing: Timing
    reason: str
    memory: Literal["ideal", "strict"] = "ideal"


class _Entry(NamedTuple):
    schedule: Schedule
    timing: Timing
    memory: Literal["ideal", "strict"]


def auto(
    *,
    devices: int,
    microbatches: int,
    repeats: int | None = None,
    costs: Costs | None = None,
    memory: float | Sequence[float] | None = None,
    runtime: Runtime = "async",
    split: bool = True,
) -> Choice:
    """Chooses a schedule.

    Args:
        devices: P.
        microbatches: M.
        repeats: V; by default what per-stage costs imply, else 1 and 2 are tried.
        costs: Times of the phases, by default 1 each. Per-stage sequences fix V.
        memory: The most activations a device may keep, in units of what one microbatch leaves on a full device; one
            number, or one per device. None for no limit.
        runtime: What the makespan is measured under, see `simulate`.
        split: Whether the backward may be split into I and W.

    Returns:
        The schedule with its timing and the reason.

    Raises:
        ScheduleError: The limit is below one microbatch, or the numbers contradict each other.

    Example:
        >>> from jaxpipe.schedule import build
        >>> choice = auto(devices=4, microbatches=8, memory=4)
        >>> choice.timing.makespan <= simulate(build("1f1b", devices=4, microbatches=8)).makespan
        True
    """
    costs = costs or Costs()
    limits = _limits(devices, memory)
    tried = _repeats(devices, repeats, costs)
    entries = [s for s in _entries(devices, microbatches, tried) if split or "W" not in s.phases]
    fitting = list(_fitting(entries, costs, runtime, limits))
    found = list(_fitting(_searched(devices, microbatches, tried, costs, limits, split), costs, runtime, limits))
    # [1] A searched order keeps to its caps, and caps of one microbatch can always be met: `found` is never empty.
    best, best_found = min(fitting, key=_rank, default=None), min(found, key=_rank)
    within = "" if memory is None else f" within memory={memory}"
    makespan = best_found.timing.makespan
    if best is not None and makespan >= best.timing.makespan * (1 - 1e-9):
        first = f"{best.schedule.name} has the smallest makespan, {best.timing.makespan:.6g},"
        rest = f"of {len(fitting)} catalogue entries{within}; {len(found)} searched orders were no faster"
        return Choice(best.schedule, best.timing, f"{first} {rest}", best.memory)
    schedule, timing, kept = best_found
    verify(schedule)
    how = f"{schedule.placement} V={schedule.repeats}, {'split' if 'W' in schedule.phases else 'whole'} backward"
    reason = f"searched order ({how}), makespan {makespan:.6g}: "
    if best is None:
        return Choice(schedule, timing, f"{reason}no catalogue entry fits{within}", kept)
    than = f"{best.schedule.name} (V={best.schedule.repeats}), the best catalogue entry{within}"
    return Choice(schedule, timing, f"{reason}{1 - makespan / best.timing.makespan:.1%} less than {than}", kept)


def _fitting(
    schedules: Iterable[Schedule], costs: Costs, runtime: Runtime, limits: Sequence[float]
) -> Iterator[_Entry]:
    """Those within the limits, as `lower` would move them or else in their own order."""
    for schedule in schedules:
        for memory in ("ideal", "strict") if runtime != "async" else ("ideal",):
            timing = simulate(schedule, costs, runtime, memory=memory)
            if all(peak <= limit + 1e-9 for peak, limit in zip(timing.peak_activations, limits, strict=True)):
                yield _Entry(schedule, timing, memory)
                break


def _rank(entry: _Entry) -> tuple[float, float, int]:
    return round(entry.timing.makespan, 9), max(entry.timing.peak_activations), entry.schedule.repeats


def _limits(devices: int, memory: float | Sequence[float] | None) -> list[float]:
    if memory is None:
        return [float("inf")] * devices
    limits = [float(limit) for limit in memory] if isinstance(memory, Sequence) else [float(memory)] * devices
    if len(limits) != devices:
        raise ScheduleError(f"memory has {len(limits)} numbers but must have one per device; try {devices}")
    if min(limits) < 1:
        raise ScheduleError(f"memory={memory} must be at least 1 on every device: one microbatch; try 1")
    return limits


def _repeats(devices: int, repeats: int | None, costs: Costs) -> tuple[int, ...]:
    lengths = {len(v) for v in vars(costs).values() if isinstance(v, Sequence)}
    for length in lengths:
        if length % devices or (repeats is not None and length != devices * repeats):
            nearest = devices * (repeats or max(1, round(length / devices)))
            raise ScheduleError(f"costs have {length} numbers but must have one per stage; try {nearest}")
    if len(lengths) > 1:
        raise ScheduleError(f"costs have {sorted(lengths)} numbers but must all have one per stage; try {max(lengths)}")
    if lengths:
        return (lengths.pop() // devices,)
    return TRIED_REPEATS if repeats is None else (repeats,)


def _entries(devices: int, microbatches: int, tried: Sequence[int]) -> Iterator[Schedule]:
    """The training schedules of the catalogue that exist for these numbers."""
    for (name, family), repeats in product(CATALOG.items(), tried):
        factor, plus = family.least
        if name != "inference" and family.repeats in (None, repeats) and microbatches >= factor * devices + plus:
            yield entry(name, devices=devices, microbatches=microbatches, repeats=repeats)


def _searched(
    devices: int, microbatches: int, tried: Sequence[int], costs: Costs, limits: Sequence[float], split: bool
) -> Iterator[Schedule]:
    """One schedule for every sensible policy."""
    placements: tuple[Placement, ...] = ("loop", "v")
    for repeats, placement in product(tried, placements):
        if placement == "v" and repeats == 1:
            continue
        seen = set()
        empty = Schedule("auto", devices, microbatches, repeats, placement, ())
        for policy, most in product(_policies(repeats, split), (devices, 2 * devices, microbatches)):
            caps = [int(min(limit, max(1, most), microbatches) * repeats + 1e-9) for limit in limits]
            if (policy, tuple(caps)) not in seen:
                seen.add((policy, tuple(caps)))
                yield list_schedule(empty, costs, caps, policy)


def _policies(repeats: int, split: bool) -> Iterator[Policy]:
    orders = ("late", "groups") if repeats > 1 else ("late",)
    for forwards in orders:
        yield Policy(False, forwards)
        if split:
            yield Policy(True, forwards)
            yield Policy(True, forwards, patience=0.5)
