"""What becomes of every step's numbers: checked, timed, written, shown."""

import math
import time
from collections.abc import Callable, Mapping
from statistics import fmean

from jaxpipe.config.sections import HealthConfig
from jaxpipe.terminal import Report
from jaxpipe.train.health import Health
from jaxpipe.train.report.metrics import MetricsLog


class Track:
    """Follows one run.

    Args:
        log: Takes a line of metrics every `log_every` steps, the first and the last step included.
        report: Is shown the same.
        steps: Steps of the whole run.
        tokens_per_step: Tokens in a batch.
        log_every: Steps between two lines.
        health: Judges the numbers; by default one that fails at the first that is not finite.
        peak_steps_per_s: Steps that the devices could do per second if they did nothing but the model's arithmetic, or
            None where nobody knows.
        busy_s: Of a step, what a device works by a profile of these devices, or None where there is none.

    Attributes:
        last: Metrics of the last step that was settled; empty before the first.
        val_loss: The last validation loss, nan before the first.
    """

    def __init__(
        self,
        log: MetricsLog,
        report: Report,
        *,
        steps: int,
        tokens_per_step: int,
        log_every: int,
        health: Health | None = None,
        peak_steps_per_s: float | None = None,
        busy_s: float | None = None,
    ):
        self.last: dict[str, float] = {}
        self.val_loss = math.nan
        self._log, self._report, self._health = log, report, health or Health(HealthConfig())
        self._steps, self._tokens, self._every = steps, tokens_per_step, log_every
        self._peak, self._busy_s = peak_steps_per_s, busy_s
        self._clock = time.perf_counter()
        self._since_line: list[tuple[float, float]] = []

    def resume(self, step: int, loss: float | None, val_loss: float | None):
        """Goes on after a step with the numbers of then."""
        self.last = {"step": step} if loss is None else {"step": step, "loss": loss}
        self.val_loss = math.nan if val_loss is None else val_loss
        self._since_line = []

    def restart_clock(self):
        """What happened since the last step does not count as step time."""
        self._clock = time.perf_counter()

    def settle(self, step: int, metrics: Mapping, data_time_s: float | None = None):
        """Waits for a step's metrics, scalars on the device, and deals with them.

        Args:
            step: The step.
            metrics: Its metrics.
            data_time_s: How long the host made its batch.

        Raises:
            NonFiniteError: The loss or the gradient norm is not finite, and the run shall end.
            RollBack: Likewise, and it shall go back.
        """
        first = [name for name in ("loss", "grad_norm", "lr") if name in metrics]
        names = [*first, *sorted(metrics.keys() - set(first))]  # a compiled program sorts its outputs
        values = {name: float(metrics[name]) for name in names}
        for name in ("loss", "grad_norm"):
            if self._health.is_bad(f"{name} at step {step}", values[name], self._last_good()):
                self._log.write(step=step, event="skipped", reason=f"{name} is {values[name]}")
                self._report.note(f"skipped    step {step}: {name} is {values[name]}; weights stay as they were")
                self.restart_clock()
                return
        mean = self._health.spike(values)
        if mean is not None:
            self._log.write(step=step, event="spike", loss=values["loss"], mean=mean)
            self._report.note(f"spike      step {step}: loss {values['loss']:.3f}, the mean before it was {mean:.3f}")
        now = time.perf_counter()
        self._since_line.append((now - self._clock, data_time_s or 0.0))
        self._clock = now
        self.last = {"step": step, **values}
        if step % self._every and step not in (1, self._steps):
            return
        step_time_s, host_time_s = (fmean(times) for times in zip(*self._since_line, strict=True))
        self._since_line = []
        line = {**self.last, "step_time_s": step_time_s, "tokens_per_s": self._tokens / step_time_s}
        if data_time_s is not None:
            line["data_time_s"] = host_time_s
        if self._peak is not None:
            line["mfu"] = 1.0 / (step_time_s * self._peak)
        if self._busy_s is not None:
            line["bubble"] = max(0.0, 1.0 - self._busy_s / step_time_s)
        self._log.write(**line)
        self._report.progress(step, self._steps, line)

    def validate(self, step: int, measure: Callable[[], float]):
        """Takes a validation loss; the time it takes does not count as step time.

        Raises:
            NonFiniteError: It is not finite, and the run shall end.
            RollBack: Likewise, and it shall go back.
        """
        measured = measure()
        self._health.is_bad(f"validation loss at step {step}", measured, self._last_good())
        self.val_loss = measured
        self._log.write(step=step, val_loss=self.val_loss)
        self._report.note(f"step {step:>{len(str(self._steps))}}/{self._steps}  validation loss {self.val_loss:.3f}")
        self._clock = time.perf_counter()

    def _last_good(self) -> str:
        if not self.last:
            return "no step before it was good"
        return "last good: " + ", ".join(f"{name} {value:.6g}" for name, value in self.last.items())
