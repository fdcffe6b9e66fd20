"""The schedule as a value: who does what, in which order.

A schedule says order only. It knows nothing of time (that is `simulate`), of the compiled loop's ticks and buffers
(that is `lower`) or of arrays. Stage numbers are global, ``0 .. devices * repeats - 1``; where a stage lives follows
from the placement and is written here, once.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from jaxpipe.errors import ScheduleError, one_of_type

Phase = Literal["F", "B", "I", "W"]
"""F forward, B full backward, I input gradient only, W weight gradient only."""

PHASES: tuple[Phase, ...] = ("F", "B", "I", "W")

Placement = Literal["loop", "v"]
"""loop: stage s lives on device s mod P. v: a snake, devices 0..P-1 and then P-1..0."""

_ACTION = re.compile(r"(0|[1-9]\d*)([FBIW])(0|[1-9]\d*)")


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """One stage, one phase, one microbatch. Its text form is ``3F7``: stage 3, forward, microbatch 7.

    Example:
        >>> str(Action(3, "F", 7))
        '3F7'
        >>> Action.parse("3F7")
        Action(stage=3, phase='F', microbatch=7)
    """

    stage: int
    phase: Phase
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.phase}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """Reads the text form.

        Raises:
            ScheduleError: The text is not ``STAGE KIND MICROBATCH`` with KIND one of F, B, I, W.
        """
        match = _ACTION.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise ScheduleError(f"action {text!r} must read STAGE, one of F B I W, MICROBATCH; try '0F0'")
        stage, phase, microbatch = match.groups()
        return cls(int(stage), phase, int(microbatch))  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Schedule:
    """For each device its actions in order.

    Attributes:
        name: Catalogue name, or a free name for an order of one's own.
        devices: P, places on the mesh axis `pipe`.
        microbatches: M, equal slices of the batch.
        repeats: V, stages per device.
        placement: Where stages live.
        order: ``order[d]`` is the tuple of device d's actions, first to last.
    """

    name: str
    devices: int
    microbatches: int
    repeats: int
    placement: Placement
    order: tuple[tuple[Action, ...], ...]

    @property
    def stages(self) -> int:
        """S, the number of stages, P·V."""
        return self.devices * self.repeats

    def device_of(self, stage: int) -> int:
        """The device that owns a stage."""
        turn, place = divmod(stage, self.devices)
        backwards = self.placement == "v" and turn % 2 == 1
        return self.devices - 1 - place if backwards else place

    def repeat_of(self, stage: int) -> int:
        """Which of its device's stages this is, 0..V-1."""
        return stage // self.devices

    def stage_at(self, device: int, repeat: int) -> int:
        """The stage that a device runs as its `repeat`-th."""
        backwards = self.placement == "v" and repeat % 2 == 1
        return repeat * self.devices + (self.devices - 1 - device if backwards else device)

    def direction(self, sender: int, receiver: int) -> int:
        """Which way the hop between two adjacent stages goes: 1 right, -1 left, 0 no hop (same device).

        In placement `loop` forwards always go right, the wrap from the last device to the first included.
        """
        if self.device_of(sender) == self.device_of(receiver):
            return 0
        if self.placement == "loop":
            return receiver - sender
        return self.device_of(receiver) - self.device_of(sender)

    @cached_property
    def phases(self) -> frozenset[Phase]:
        """The phases that occur."""
        return frozenset(action.phase for actions in self.order for action in actions)

    def __str__(self) -> str:
        return _printers[-1](self)


_printers: list[Callable[[Schedule], str]] = [repr]


def print_with(printer: Callable[[Schedule], str]) -> Callable[[Schedule], str]:
    """Makes a function what `str` of a schedule is; a decorator. A value need not know its picture."""
    _printers.append(printer)
    return printer


def check_schedule(schedule: Any) -> None:
    """Raises ScheduleError for anything but a schedule: its name alone, say."""
    name = schedule if isinstance(schedule, str) else "1f1b"
    near = f"jaxpipe.schedule.build({name!r}, devices=…, microbatches=…)"
    one_of_type("schedule", schedule, Schedule, near, ScheduleError)
