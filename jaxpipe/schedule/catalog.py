"""The names that `build` takes."""

import difflib
from typing import Any

from jaxpipe.errors import ScheduleError, whole_number
from jaxpipe.schedule.families import (
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


def counted(
    devices: Any, microbatches: Any, repeats: Any = None, group_size: Any = None
) -> tuple[int, int, int | None, int | None]:
    """The numbers of a schedule as Python's own.

    Raises:
        ScheduleError: One is no whole number of at least 1, or together they are too large.
    """
    devices = whole_number("devices", devices, error=ScheduleError)
    microbatches = whole_number("microbatches", microbatches, error=ScheduleError)
    repeats, group_size = (
        None if value is None else whole_number(option, value, error=ScheduleError)
        for option, value in (("repeats", repeats), ("group_size", group_size))
    )
    stages = devices * (repeats or 1)
    if microbatches * stages > MAX_CELLS:
        raise ScheduleError(
            f"devices*microbatches*repeats={devices}*{microbatches}*{repeats or 1}={microbatches * stages} must be at "
            f"most {MAX_CELLS}; try microbatches={max(1, MAX_CELLS // stages)}"
        )
    return devices, microbatches, repeats, group_size


def entry(
    name: str, *, devices: int, microbatches: int, repeats: int | None = None, group_size: int | None = None
) -> Schedule:
    """The schedule of a name, see `jaxpipe.schedule.build`.

    Raises:
        ScheduleError: No such name, or numbers for which it does not exist.
    """
    devices, microbatches, repeats, group_size = counted(devices, microbatches, repeats, group_size)
    family = CATALOG.get(name) if isinstance(name, str) else None
    if family is None:
        names = [*CATALOG, "auto"]
        near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)[0]
        raise ScheduleError(f"schedule={name!r} is not one of {', '.join(names)}; try {near!r}")
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
