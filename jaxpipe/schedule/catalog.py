"""The names that `build` takes."""

import difflib
from collections.abc import Sequence

from jaxpipe.errors import ScheduleError, whole_number
from jaxpipe.schedule import (
    breadth_first,
    circular,
    dualpipe_v,
    eager,
    gpipe,
    inference,
    interleaved,
    interleaved_zb,
    one_f_one_b,
    v_half,
    v_min,
    zb_h1,
    zb_h2,
    zb_v,
)
from jaxpipe.schedule.costs import Costs, check_costs
from jaxpipe.schedule.family import Family
from jaxpipe.schedule.ir import Schedule

CATALOG: dict[str, Family] = {
    "gpipe": gpipe.FAMILY,
    "circular": circular.FAMILY,
    "breadth_first": breadth_first.FAMILY,
    "1f1b": one_f_one_b.FAMILY,
    "eager_1f1b": eager.FAMILY,
    "interleaved_1f1b": interleaved.FAMILY,
    "zb_h1": zb_h1.FAMILY,
    "zb_h2": zb_h2.FAMILY,
    "interleaved_zb": interleaved_zb.FAMILY,
    "zb_v": zb_v.FAMILY,
    "v_half": v_half.FAMILY,
    "v_min": v_min.FAMILY,
    "dualpipe_v": dualpipe_v.FAMILY,
    "inference": inference.FAMILY,
}

MAX_CELLS = 1 << 24
"""Forwards of a schedule, on all devices: a hundred times those of the largest runs, and what still fits in memory."""


def build(
    name: str,
    *,
    devices: int,
    microbatches: int,
    repeats: int | None = None,
    group_size: int | None = None,
    costs: Costs | None = None,
    memory: float | Sequence[float] | None = None,
) -> Schedule:
    """Builds a schedule of the catalogue.

    Args:
        name: A key of `CATALOG`, or ``auto`` for what the function `auto` chooses.
        devices: P ≥ 1.
        microbatches: M ≥ 1; some families need more.
        repeats: V ≥ 1, stages per device, by default the family's own: 2 on the snake placement, else 1.
        group_size: For `interleaved_1f1b`, how many microbatches go round the ring together, P ≤ group_size ≤ M. By
            default groups are balanced.
        costs: For `auto`, the times that it minimises.
        memory: For `auto`, the most activations that a device may keep, see there.

    Returns:
        A schedule that `verify` accepts.

    Raises:
        ScheduleError: An unknown name (the nearest is shown) or a number for which the family has no schedule.

    Example:
        >>> from jaxpipe.schedule import build
        >>> [str(action) for action in build("1f1b", devices=2, microbatches=2).order[0]]
        ['0F0', '0F1', '0B0', '0B1']
    """
    devices = whole_number("devices", devices, error=ScheduleError)
    microbatches = whole_number("microbatches", microbatches, error=ScheduleError)
    repeats, group_size = (
        None if value is None else whole_number(option, value, error=ScheduleError)
        for option, value in (("repeats", repeats), ("group_size", group_size))
    )
    check_costs(costs)
    stages = devices * (repeats or 1)
    if microbatches * stages > MAX_CELLS:
        raise ScheduleError(
            f"devices*microbatches*repeats={devices}*{microbatches}*{repeats or 1}={microbatches * stages} must be at "
            f"most {MAX_CELLS}; try microbatches={max(1, MAX_CELLS // stages)}"
        )
    if name == "auto":
        if group_size is not None:
            raise ScheduleError(f"group_size={group_size} has no effect for auto; try 'interleaved_1f1b'")
        from jaxpipe.schedule.auto import auto  # which builds the entries to compare with

        return auto(devices=devices, microbatches=microbatches, repeats=repeats, costs=costs, memory=memory).schedule
    family = CATALOG.get(name) if isinstance(name, str) else None
    if family is None:
        names = [*CATALOG, "auto"]
        near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)[0]
        raise ScheduleError(f"schedule={name!r} is not one of {', '.join(names)}; try {near!r}")
    for option, value in (("costs", costs), ("memory", memory)):
        if value is not None:
            raise ScheduleError(f"{option} has no effect for {name}, whose order is fixed; try 'auto'")
    repeats = family.default_repeats if repeats is None else repeats
    if family.repeats not in (None, repeats):
        others = " or interleaved_1f1b for other repeats" if family.placement == "loop" else ""
        raise ScheduleError(f"repeats={repeats} must be {family.repeats} for {name}; try {family.repeats}{others}")
    _check_least(name, family, devices, microbatches)
    options = {}
    if group_size is not None:
        if "group_size" not in family.options:
            raise ScheduleError(f"group_size={group_size} has no effect for {name}; try 'interleaved_1f1b'")
        options["group_size"] = group_size
    order = family.order(devices, microbatches, repeats, **options)
    return Schedule(name, devices, microbatches, repeats, family.placement, order)


def _check_least(name: str, family: Family, devices: int, microbatches: int) -> None:
    factor, plus = family.least
    least = factor * devices + plus
    if microbatches < least:
        rule = f"{factor}*devices" if factor != 1 else "devices"
        rule += f"{plus:+}" if plus else ""
        raise ScheduleError(f"microbatches={microbatches} must be at least {rule}={least} for {name}; try {least}")
