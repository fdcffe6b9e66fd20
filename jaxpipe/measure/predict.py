"""What a run is predicted to take, beside what it takes."""

import statistics
import time
from dataclasses import replace

from jaxpipe.config.run import Config
from jaxpipe.errors import ConfigError, JaxpipeError
from jaxpipe.measure.planning import Resolved, is_open, present_device, resolve
from jaxpipe.measure.profile import read_profile
from jaxpipe.plan import Plan
from jaxpipe.plan.device import MEMORY_FRACTION
from jaxpipe.terminal import Report

WARM, STEPS = 2, 5
"""Steps that are not looked at, and the number of those that are."""


def resolved(config: Config) -> Resolved:
    """A config with what it leaves open filled in for the present devices, and the prediction.

    Raises:
        ConfigError: It leaves something open, and nothing fits or nothing is known of the devices.
    """
    try:
        device, costs = present_device(), None
        if config.schedule.profile:
            found = read_profile(config.schedule.profile)
            device = replace(device, memory_bytes_per_s=found.traffic_bytes_per_s / MEMORY_FRACTION)
            costs = found.costing(config, config.schedule.profile)
        return resolve(config, device, costs)
    except JaxpipeError:
        if is_open(config) or config.schedule.profile:
            raise
        return Resolved(config, None)


def refuse_open(config: Config) -> None:
    """For models that the planner cannot see.

    Raises:
        ConfigError: The config leaves something open.
    """
    for key in ("name", "stages"):
        if getattr(config.schedule, key) == "auto":
            near = "'interleaved_1f1b'" if key == "name" else "'even'"
            raise ConfigError(f"schedule.{key}='auto' needs the config's own model; try {near}")


class Beside:
    """Says the prediction at the start of a run and the measured step beside it once, when it is warm.

    Args:
        plan: The prediction; None for none.
        report: Who is told.
    """

    def __init__(self, plan: Plan | None, report: Report):
        self._plan, self._report = plan, report
        self._times: list[float] = []
        self._last: float | None = None
        self._settled = 0
        if plan is not None:
            report.note(
                f"predicted  {_time(plan.step_s)} per step, bubble {plan.bubble:.1%}, "
                f"{plan.memory.total / 1e9:.3g} GB per device ({plan.source} costs)"
            )

    def settle(self):
        """A step is done."""
        now = time.perf_counter()
        self._settled += 1
        if self._last is not None and self._settled > WARM:
            self._times.append(now - self._last)
        self._last = now
        if self._plan is None or len(self._times) != STEPS:
            return
        measured = statistics.median(self._times)
        error = self._plan.step_s / measured - 1
        self._report.note(f"measured   {_time(measured)} per step, {_time(self._plan.step_s)} predicted: {error:+.0%}")


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
