"""List scheduling: an order made by always running the most urgent action that can start, for given costs.

Unlike the families, it knows the costs of every stage and a memory limit per device. It decides action by action and
never takes anything back, so the result is good but not optimal; a `Policy` says what counts as urgent.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from jaxpipe.schedule.costs import Costs
from jaxpipe.schedule.ir import Action, Phase, Schedule
from jaxpipe.schedule.rules import Value, reads, writes


@dataclass(frozen=True)
class Policy:
    """What the next action is chosen by.

    Attributes:
        split: Whether the backward is split into I and W.
        forwards: Which forward goes first: ``late``, the one of the latest stage, or ``groups``, in groups of as many
            microbatches as devices.
        patience: How long a device waits for an input before it starts a W instead, as a share of the W's time.
    """

    split: bool
    forwards: Literal["late", "groups"] = "late"
    patience: float = 0.0


@dataclass
class _Device:
    """What a device has done and what it may do next."""

    free: float = 0.0
    kept: int = 0


def list_schedule(empty: Schedule, costs: Costs, caps: Sequence[int], policy: Policy) -> Schedule:
    """Orders all actions of a schedule that has none yet.

    Microbatches keep their index order within a stage and phase. A forward of an early repeat leaves room for one
    activation of each later one, so a cap of at least `repeats` never blocks.

    Args:
        empty: Devices, microbatches, repeats and placement; its order is not read.
        costs: Times, hop included.
        caps: Per device, the most stage activations it may keep, from F to B or W; at least `repeats`.
        policy: What is urgent.

    Returns:
        The schedule.
    """
    return _Listing(empty, costs, caps, policy).run()


class _Listing:
    """One run of `list_schedule`."""

    def __init__(self, empty: Schedule, costs: Costs, caps: Sequence[int], policy: Policy):
        self.empty, self.caps, self.policy, self.hop = empty, caps, policy, costs.hop
        self.phases: tuple[Phase, ...] = ("F", "I", "W") if policy.split else ("F", "B")
        stages = range(empty.stages)
        self.price = {(s, p): costs.of(Action(s, p, 0), empty) for s, p in product(stages, self.phases)}
        self.price[empty.stages - 1, "F"] += costs.head
        self.following = {key: 0 for key in self.price}
        self.stages_of = [[empty.stage_at(d, c) for c in range(empty.repeats)] for d in range(empty.devices)]
        self.arrives: dict[Value, float] = {}
        self.devices = [_Device() for _ in range(empty.devices)]
        self.rows: list[list[Action]] = [[] for _ in range(empty.devices)]

    def run(self) -> Schedule:
        best = [self._best(d) for d in range(self.empty.devices)]
        for _ in range(len(self.price) * self.empty.microbatches):
            # [1] Devices go on in the order of time, so that what one waits for is known when it decides.
            device = min(range(len(best)), key=lambda d: best[d][0])
            start, action = best[device]
            assert action is not None, "caps below `repeats`"
            self._take(device, start, action)
            for d in {device, *(self.empty.device_of(v.stage) for v in writes(action, self.empty.stages))}:
                best[d] = self._best(d)
        return replace(self.empty, order=tuple(map(tuple, self.rows)))

    def _take(self, device: int, start: float, action: Action) -> None:
        state = self.devices[device]
        state.free = start + self.price[action.stage, action.phase]
        state.kept += (action.phase == "F") - (action.phase in "BW")
        self.following[action.stage, action.phase] += 1
        self.rows[device].append(action)
        for value in writes(action, self.empty.stages):
            away = self.empty.device_of(value.stage) != device
            self.arrives[value] = state.free + self.hop * away

    def _best(self, device: int) -> tuple[float, Action | None]:
        """When the device goes on next, and with what."""
        state = self.devices[device]
        ready: list[tuple[float, tuple[int, ...], Action]] = []
        for repeat, stage in enumerate(self.stages_of[device]):
            for phase in self.phases:
                m = self.following[stage, phase]
                if m == self.empty.microbatches or (phase == "F" and not self._has_room(device, repeat)):
                    continue
                action = Action(stage, phase, m)
                inputs = [self.arrives.get(value) for value in reads(action, self.empty.stages)]
                if None not in inputs:
                    when = max([state.free, *(i for i in inputs if i is not None)])
                    ready.append((when, self._urgency(action, repeat), action))
        if not ready:
            return float("inf"), None
        first = min(when for when, _, _ in ready)
        _, _, action = min((entry for entry in ready if entry[0] == first), key=lambda entry: entry[1])
        if action.phase == "W":
            waits = first + self.policy.patience * self.price[action.stage, "W"]
            soon = [entry for entry in ready if entry[2].phase != "W" and entry[0] < waits]
            if soon:
                first, _, action = min(soon)
        return first, action

    def _has_room(self, device: int, repeat: int) -> bool:
        return self.devices[device].kept + self.empty.repeats - 1 - repeat < self.caps[device]

    def _urgency(self, action: Action, repeat: int) -> tuple[int, ...]:
        """Smaller goes first: backwards of the latest repeat, forwards by policy, then the oldest W."""
        match action.phase:
            case "F" if self.policy.forwards == "late":
                return (1, -repeat, action.microbatch)
            case "F":
                return (1, action.microbatch // self.empty.devices, repeat, action.microbatch)
            case "W":
                return (2, action.microbatch, -repeat)
            case _:
                return (0, action.microbatch, -repeat)
