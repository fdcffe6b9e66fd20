"""What a family of the catalogue says of itself: how it orders actions, its bubble and its memory.

The claims are functions, so that the tests can hold the simulator to them. Arguments of every form: p devices,
m microbatches, v repeats; f, i, w the times of the forward, the input gradient and the weight gradient of a full device
for one microbatch. Forms are for uniform stages and hops that take no time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxpipe.schedule.ir import Action, Placement

Order = tuple[tuple[Action, ...], ...]
"""``order[device]``: that device's actions, first to last."""

Claim = Literal["exact", "at most", "about"]
"""What a form promises of the simulated number. "about" is not tested: the form is a rule of thumb there."""

Form = Callable[[int, int, int, float, float, float], float]
"""``(p, m, v, f, i, w) -> idle time``."""


def always(*shape: float) -> Claim:
    """The claim of a form that is exact for every shape and all costs."""
    return "exact"


@dataclass(frozen=True)
class Family:
    """One entry of the catalogue.

    Attributes:
        order: ``(devices, microbatches, repeats) -> order``; `options` are further keyword arguments.
        summary: One line.
        bubble: Idle time per device, in the measure that `measure` names.
        peak: ``(p, m, v, device) -> activations kept``, in units of what one microbatch leaves on a full device.
        measure: ``makespan`` (first start to last end over all devices) or ``span`` (the longest of one device).
        bubble_claim: ``(p, m, v, f, i, w) -> claim``.
        peak_claim: Of every device.
        placement: Where stages live.
        repeats: The only number of repeats that it has, or None for any.
        least: (a, b): microbatches must be at least a·devices + b.
        options: Names of options that only some families have.
    """

    order: Callable[..., Order]
    summary: str
    bubble: Form
    peak: Callable[[int, int, int, int], float]
    measure: Literal["makespan", "span"] = "makespan"
    bubble_claim: Callable[[int, int, int, float, float, float], Claim] = always
    peak_claim: Claim = "exact"
    placement: Placement = "loop"
    repeats: int | None = None
    least: tuple[int, int] = (0, 1)
    options: frozenset[str] = frozenset()

    @property
    def default_repeats(self) -> int:
        """The repeats that `build` takes when none are given."""
        return self.repeats or 1


def full_bubble(p: int, m: int, v: int, f: float, i: float, w: float) -> float:
    """(p-1)(f+i+w)/v, and where a round of the ring is longer than the microbatches fill, that too."""
    return (p - 1 + (v - 1) * max(0, p - m)) * (f + i + w) / v
