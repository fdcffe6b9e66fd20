"""What an action costs, in any unit of time. Never part of a schedule: the same order is priced for many machines."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from jaxpipe.errors import ScheduleError, one_of_type
from jaxpipe.schedule.ir import Action, Schedule


@dataclass(frozen=True)
class Costs:
    """Times of the phases.

    A number is the time of a full device (all its V stages) for one microbatch, so that costs do not change with V. A
    sequence has one number per stage, in stage order.

    Attributes:
        forward: tF.
        backward_input: tI, the gradient of the stage's input.
        backward_weight: tW, the gradient of its weights. A full backward costs tI + tW.
        hop: Time of one transfer between neighbours.
        recompute: Added to every B or I, for stages that run their forward again.
        head: Time of one microbatch's vocab-parallel head, which all devices run together when the last stage's F is
            done; 0 where the last stage runs the head alone (its time is then part of that stage's). See `simulate`.

    Raises:
        ScheduleError: A cost is negative, or no number.

    Example:
        >>> Costs(forward=1.0, backward_input=1.0, backward_weight=1.0).backward_input
        1.0
    """

    forward: float | Sequence[float] = 1.0
    backward_input: float | Sequence[float] = 1.0
    backward_weight: float | Sequence[float] = 1.0
    hop: float = 0.0
    recompute: float | Sequence[float] = 0.0
    head: float = 0.0

    def __post_init__(self):
        for name in ("forward", "backward_input", "backward_weight", "hop", "recompute", "head"):
            given: Any = getattr(self, name)
            value = given.tolist() if hasattr(given, "tolist") else given  # NumPy's and JAX's
            several = isinstance(value, Sequence) and not isinstance(value, str)
            for number in value if several and name not in ("hop", "head") else (value,):
                if isinstance(number, bool) or not isinstance(number, int | float):
                    rule = "must be a number" + (" or one per stage" if name not in ("hop", "head") else "")
                    raise ScheduleError(f"{name}={given!r} {rule}; try 1.0")
                if not number >= 0:
                    raise ScheduleError(f"{name}={given} must not be negative; try 0")
                if number == inf:
                    raise ScheduleError(f"{name}={given} must be finite; try 1.0")
            object.__setattr__(self, name, value)

    def of(self, action: Action, schedule: Schedule) -> float:
        """The time of one action, without the head that all devices run.

        Raises:
            ScheduleError: A per-stage sequence does not have one number per stage.
        """
        match action.phase:
            case "F":
                names = ("forward",)
            case "B":
                names = ("backward_input", "backward_weight", "recompute")
            case "I":
                names = ("backward_input", "recompute")
            case _:
                names = ("backward_weight",)
        return sum(self._stage_cost(name, action.stage, schedule) for name in names)

    def prices(self, schedule: Schedule) -> dict[tuple[int, str], float]:
        """The times of all actions, by stage and phase, as `of` gives them."""
        return {(s, p): self.of(Action(s, p, 0), schedule) for s in range(schedule.stages) for p in schedule.phases}

    def _stage_cost(self, name: str, stage: int, schedule: Schedule) -> float:
        value = getattr(self, name)
        if not isinstance(value, Sequence):
            return value / schedule.repeats
        if len(value) != schedule.stages:
            raise ScheduleError(f"{name} has {len(value)} numbers but must have one per stage; try {schedule.stages}")
        return value[stage]


def relative_costs(counts: Sequence[int], remats: Sequence[Any], schedule: Schedule) -> Costs:
    """Times of the phases as far as they are known: in proportion to a stage's blocks, and a forward more for remat.

    Args:
        counts: Blocks of each stage.
        remats: What each stage keeps, see `jaxpipe.Pipeline`.
        schedule: What runs.
    """
    recompute = [1.0 if remat == "full" else 0.0 for remat in remats]
    if len(set(counts)) == 1 and len(set(recompute)) == 1:
        return Costs(recompute=recompute[0])
    times = [count * schedule.devices / max(1, sum(counts)) for count in counts]
    again = [time * share for time, share in zip(times, recompute, strict=True)]
    return Costs(forward=times, backward_input=times, backward_weight=times, recompute=again)


def check_costs(costs: Any) -> None:
    """Raises ScheduleError for anything but costs, or None for the default."""
    if costs is not None:
        one_of_type("costs", costs, Costs, "Costs(forward=1.0, hop=0.1)", ScheduleError)
