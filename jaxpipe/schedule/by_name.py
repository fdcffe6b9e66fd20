"""`build`: a schedule by its name."""

from collections.abc import Sequence

from jaxpipe.errors import ScheduleError
from jaxpipe.schedule.auto import auto
from jaxpipe.schedule.catalog import CATALOG, counted, entry
from jaxpipe.schedule.costs import Costs, check_costs
from jaxpipe.schedule.ir import Schedule


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
    devices, microbatches, repeats, group_size = counted(devices, microbatches, repeats, group_size)
    check_costs(costs)
    if name == "auto":
        if group_size is not None:
            raise ScheduleError(f"group_size={group_size} has no effect for auto; try 'interleaved_1f1b'")
        return auto(devices=devices, microbatches=microbatches, repeats=repeats, costs=costs, memory=memory).schedule
    if isinstance(name, str) and name in CATALOG:
        for option, value in (("costs", costs), ("memory", memory)):
            if value is not None:
                raise ScheduleError(f"{option} has no effect for {name}, whose order is fixed; try 'auto'")
    return entry(name, devices=devices, microbatches=microbatches, repeats=repeats, group_size=group_size)
