"""A small language for orders on the snake placement, where each device has a first and a second half of the model.

A step is a phase and a half: ``F0`` is the forward of the device's stage in the first half (stage i), ``I1`` the input
gradient of its stage in the second (stage 2P-1-i). Each step takes the next microbatch of its kind.
"""

from collections import Counter, deque

from jaxpipe.schedule.ir import Action, Phase


class DeviceHalves:
    """Collects one device's actions, step by step.

    Attributes:
        actions: What was run so far.
        waiting: W that were put off by `later`, oldest first.
    """

    def __init__(self, device: int, devices: int):
        self._stages = (device, 2 * devices - 1 - device)
        self._next: Counter[str] = Counter()
        self.actions: list[Action] = []
        self.waiting: deque[Action] = deque()

    def times(self, count: int, steps: str) -> None:
        """Runs the steps, separated by spaces, so many times. ``W`` alone runs the oldest one that waits.

        Example:
            >>> run = DeviceHalves(0, devices=2)
            >>> run.times(2, "F0 F1")
            >>> " ".join(map(str, run.actions))
            '0F0 3F0 0F1 3F1'
        """
        for _ in range(count):
            for step in steps.split():
                self.actions.append(self.waiting.popleft() if step == "W" else self._take(step))

    def later(self, step: str) -> None:
        """Runs an I and lets its W wait."""
        action = self._take(step)
        self.actions.append(action)
        self.waiting.append(Action(action.stage, "W", action.microbatch))

    def _take(self, step: str) -> Action:
        phase, half = step
        # [1] B is I and W in one, so the three count microbatches together.
        kind = "I" + half if phase == "B" else step
        microbatch = self._next[kind]
        self._next[kind] += 1
        if phase == "B":
            self._next["W" + half] += 1
        return Action(self._stages[int(half)], _phase(phase), microbatch)


def _phase(letter: str) -> Phase:
    return letter  # pyright: ignore[reportReturnType]
