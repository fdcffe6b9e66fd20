"""The names that `build` takes, and what each family declares of itself.

The declared closed forms are what the tests hold the simulator to.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from jaxpipe.errors import ScheduleError
from jaxpipe.schedule import eager, gpipe, interleaved, one_f_one_b
from jaxpipe.schedule.ir import Action, Placement, Schedule

Order = Callable[[int, int, int], tuple[tuple[Action, ...], ...]]


@dataclass(frozen=True)
class Family:
    """One entry of the catalogue.

    Attributes:
        order: ``(devices, microbatches, repeats) -> order``.
        bubble: ``(P, V, tF, tB) -> idle time`` of the makespan, hop 0.
        peak: ``(P, M, V, device) -> activations kept``, in units of what one microbatch leaves on a full device.
        placement: Where stages live.
        repeats: The only number of repeats that it has, or None for any.
        summary: One line.
    """

    order: Order
    bubble: Callable[[int, int, float, float], float]
    peak: Callable[[int, int, int, int], float]
    summary: str
    placement: Placement = "loop"
    repeats: int | None = None


def _full_bubble(p: int, v: int, forward: float, backward: float) -> float:
    return (p - 1) * (forward + backward) / v


def _interleaved_peak(p: int, m: int, v: int, i: int) -> float:
    largest = max(max(interleaved.group_sizes(p, m)), p)
    return min((v - 1) * largest + 2 * p - 1 - 2 * i, m * v) / v


CATALOG: dict[str, Family] = {
    "gpipe": Family(gpipe.order, _full_bubble, lambda p, m, v, i: m, "fill, then drain", repeats=1),
    "1f1b": Family(one_f_one_b.order, _full_bubble, lambda p, m, v, i: min(p - i, m), "PipeDream-flush", repeats=1),
    "eager_1f1b": Family(
        eager.order, _full_bubble, lambda p, m, v, i: min(2 * (p - i) - 1, m), "1f1b with hidden hops", repeats=1
    ),
    "interleaved_1f1b": Family(
        interleaved.order, _full_bubble, _interleaved_peak, "circular: activations go round the ring V times"
    ),
}


def build(name: str, *, devices: int, microbatches: int, repeats: int = 1) -> Schedule:
    """Builds a schedule of the catalogue.

    Args:
        name: A key of `CATALOG`.
        devices: P ≥ 1.
        microbatches: M ≥ 1.
        repeats: V ≥ 1, stages per device. Families with one stage per device take only 1.

    Returns:
        A schedule that `verify` accepts.

    Raises:
        ScheduleError: An unknown name (the nearest is shown) or a number for which the family has no schedule.

    Example:
        >>> from jaxpipe.schedule import build
        >>> [str(action) for action in build("1f1b", devices=2, microbatches=2).order[0]]
        ['0F0', '0F1', '0B0', '0B1']
    """
    family = CATALOG.get(name)
    if family is None:
        near = difflib.get_close_matches(name, CATALOG, n=1, cutoff=0.0)[0]
        raise ScheduleError(f"schedule={name!r} is not one of {', '.join(CATALOG)}; try {near!r}")
    for option, value in (("devices", devices), ("microbatches", microbatches), ("repeats", repeats)):
        if not isinstance(value, int) or value < 1:
            raise ScheduleError(f"{option}={value!r} must be a whole number of at least 1; try 1")
    if family.repeats is not None and repeats != family.repeats:
        raise ScheduleError(
            f"repeats={repeats} must be {family.repeats} for {name}; try repeats={family.repeats}, "
            "or interleaved_1f1b for several stages per device"
        )
    order = family.order(devices, microbatches, repeats)
    return Schedule(name, devices, microbatches, repeats, family.placement, order)
