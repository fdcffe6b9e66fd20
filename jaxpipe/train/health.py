"""What a run does when its numbers go wrong: losses that are not finite, and losses that jump."""

import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean, pstdev

from jaxpipe.config.sections import HealthConfig
from jaxpipe.errors import JaxpipeError

WINDOW = 64
"""Losses that a spike is compared with."""
FEWEST = 16
"""Losses before which nothing is called a spike."""
ADVICE = "try a lower optim.learning_rate, more optim.warmup_steps or a lower optim.clip_norm"


class NonFiniteError(JaxpipeError):
    """The loss or the gradient is no longer a finite number; going on would only spread it."""


class RollBack(Exception):
    """The run shall go back to its last checkpoint. Caught by the loop, never seen by users."""


class Health:
    """Judges the numbers of every step under one policy.

    Args:
        config: The policy.

    Attributes:
        skipped: Steps that were left out so far.
        rollbacks: How often the run went back so far.
        in_a_row: Steps left out since the last good one.
    """

    def __init__(self, config: HealthConfig):
        self.skipped = self.rollbacks = self.in_a_row = 0
        self._config = config
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def is_bad(self, what: str, value: float, last_good: str) -> bool:
        """Whether a number is not finite and the run goes on all the same, without the step.

        Args:
            what: Number and step, such as ``loss at step 3``.
            value: The number.
            last_good: The last good numbers, for the message.

        Raises:
            NonFiniteError: The policy ends the run.
            RollBack: The policy takes it back.
        """
        if math.isfinite(value):
            return False
        policy = self._config.nonfinite
        name, _, where = what.partition(" at ")
        text = f"{name} is {value} at {where}; {last_good}"
        if policy == "rollback":
            if self.rollbacks >= self._config.max_rollbacks:
                raise NonFiniteError(f"{text}; health.max_rollbacks={self._config.max_rollbacks} are used up; {ADVICE}")
            self.rollbacks += 1
            self._losses.clear()
            raise RollBack(text)
        if policy == "skip" and not name.startswith("validation"):
            most = self._config.max_skips
            self.in_a_row += 1
            self.skipped += 1
            if self.in_a_row > most:
                raise NonFiniteError(f"{text}; health.max_skips={most} in a row are used up; {ADVICE}")
            return True
        raise NonFiniteError(f"{text}; {ADVICE}")

    def spike(self, values: Mapping[str, float]) -> float | None:
        """The mean that a finite loss is far above, or None where it is not; remembers the loss."""
        self.in_a_row = 0
        loss, found = values["loss"], None
        if self._config.spike and len(self._losses) >= FEWEST:
            mean = fmean(self._losses)
            if loss > mean + self._config.spike * max(pstdev(self._losses), 1e-3 * abs(mean)):
                found = mean
        self._losses.append(loss)
        return found
