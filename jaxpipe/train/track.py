"""What becomes of every step's numbers: checked, timed, written, shown."""

import math
import time
from collections.abc import Callable, Mapping

from jaxpipe.errors import JaxpipeError
from jaxpipe.train.metrics import MetricsLog
from jaxpipe.train.terminal import Report


class NonFiniteError(JaxpipeError):
    """The loss or the gradient is no longer a finite number; going on would only spread it."""


class Track:
    """Follows one run.

    Args:
        log: Takes a line of metrics every `log_every` steps, the first and the last step included.
        report: Is shown the same.
        steps: Steps of the whole run.
        tokens_per_step: Tokens in a batch.
        log_every: Steps between two lines.

    Attributes:
        last: Metrics of the last step that was settled; empty before the first.
        val_loss: The last validation loss, nan before the first.
    """

    def __init__(self, log: MetricsLog, report: Report, *, steps: int, tokens_per_step: int, log_every: int):
        self.last: dict[str, float] = {}
        self.val_loss = math.nan
        self._log, self._report = log, report
        self._steps, self._tokens, self._every = steps, tokens_per_step, log_every
        self._clock = time.perf_counter()
        self._since_line: list[float] = []

    def settle(self, step: int, metrics: Mapping):
        """Waits for a step's metrics, scalars on the device, and deals with them.

        Raises:
            NonFiniteError: The loss or the gradient norm is not finite.
        """
        names = [
            name for name in ("loss", "grad_norm", "lr") if name in metrics
        ]  # a compiled program sorts its outputs
        values = {name: float(metrics[name]) for name in names}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                raise NonFiniteError(f"{name} is {values[name]} at step {step}; {self._last_good()}; {_ADVICE}")
        now = time.perf_counter()
        self._since_line.append(now - self._clock)
        self._clock = now
        self.last = {"step": step, **values}
        if step % self._every and step not in (1, self._steps):
            return
        step_time_s = sum(self._since_line) / len(self._since_line)
        self._since_line = []
        line = {**self.last, "step_time_s": step_time_s, "tokens_per_s": self._tokens / step_time_s}
        self._log.write(**line)
        self._report.progress(step, self._steps, line)

    def validate(self, step: int, measure: Callable[[], float]):
        """Takes a validation loss; the time it takes does not count as step time.

        Raises:
            NonFiniteError: It is not finite.
        """
        self.val_loss = measure()
        if not math.isfinite(self.val_loss):
            raise NonFiniteError(f"validation loss is {self.val_loss} at step {step}; {self._last_good()}; {_ADVICE}")
        self._log.write(step=step, val_loss=self.val_loss)
        self._report.note(f"step {step:>{len(str(self._steps))}}/{self._steps}  validation loss {self.val_loss:.3f}")
        self._clock = time.perf_counter()

    def _last_good(self) -> str:
        if not self.last:
            return "no step before it was good"
        return "last good: " + ", ".join(f"{name} {value:.6g}" for name, value in self.last.items())


_ADVICE = "try a lower optim.learning_rate, more optim.warmup_steps or a lower optim.clip_norm"
