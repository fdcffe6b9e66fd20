"""Numbers of a run as JSON lines: one object per line, written at once, readable while the run goes on.

A training line has ``step``, ``loss`` (cross entropy in nats per token), ``lr``, ``grad_norm`` (before clipping),
``step_time_s`` (mean since the last line) and ``tokens_per_s``; a validation line has ``step`` and ``val_loss``, what
`jaxpipe eval` measures too. Step n means: after n optimizer steps, except that ``loss`` and ``grad_norm`` are those the
n-th step started from. With experts a training line has ``aux_loss``, what their auxiliary losses add to the loss that
is minimized, and as means over layers ``balance_loss`` and ``z_loss``, before their weights, and ``drop_rate``, the
share of choices of an expert that found it full. ``data_time_s`` is the part of the step time that the host spent on
making the batch, ``mfu`` the model's arithmetic over what the devices could do in that time. With a measured profile
(``schedule.profile``) ``bubble`` is the share of the step time in which a device did none of the work that the profile
says it has: schedule, hops, batches and disturbances. A line with ``event`` tells what happened: ``resumed``,
``skipped``, ``rolled back``, ``spike``.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

from jaxpipe.documents import parse_json


class Sink(Protocol):
    """Another place that numbers go to."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a step."""

    def close(self) -> None:
        """No more numbers."""


class MetricsLog:
    """Appends lines to a file, and remembers them. A disk that is full or read-only does not stop a run.

    Args:
        path: The file; an existing one is replaced, unless `after` says from where to go on.
        after: Step that the run goes on from: lines of later steps, and a last line that was torn, are dropped.
        sinks: Who gets the numbers too.
        warn: Is told once that the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        after: int | None = None,
        sinks: Sequence[Sink] = (),
        warn: Callable[[str], None] = lambda text: None,
    ):
        self._path, self._sinks, self._warn = path, sinks, warn
        self.lines: list[dict[str, Any]] = [] if after is None else read_lines(path)
        self._file: TextIO | None = None
        self.rewind(0 if after is None else after)

    def rewind(self, step: int) -> None:
        """Goes back to a step: later lines are dropped from the file, which is replaced as a whole."""
        self.lines = [line for line in self.lines if line["step"] <= step]
        if self._file is not None:
            self._file.close()
        try:
            part = self._path.with_suffix(".part")
            part.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
            part.replace(self._path)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            self._file = None
            self._cannot_write(error)

    def write(self, **values: Any):
        """Writes one line, through to the operating system."""
        self.lines.append(values)
        numbers = {name: value for name, value in values.items() if name not in ("step", "event")}
        for sink in self._sinks if "event" not in values else ():
            sink.write(values["step"], numbers)
        if self._file is None:
            self.rewind(values["step"])  # the disk may be back; all lines are written again
            return
        try:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as error:
            with suppress(OSError):  # what it holds is written again
                self._file.close()
            self._file = None
            self._cannot_write(error)

    def _cannot_write(self, error: OSError) -> None:
        self._warn(f"warning    {self._path} cannot be written: {error}; its lines are kept in memory until it can")
        self._warn = lambda text: None

    def close(self):
        """Closes the file; the lines stay."""
        for sink in self._sinks:
            sink.close()
        if self._file is None and self.lines:
            self.rewind(self.lines[-1]["step"])
        if self._file is not None:
            self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of metrics; one that is torn or is no metrics is left out, a missing file has none."""
    found = []
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for text in texts:
        try:
            line = parse_json(text, nan=True)
        except ValueError:
            continue
        if isinstance(line, dict) and _is_line(line):
            found.append(line)
    return found


def _is_line(line: dict[str, Any]) -> bool:
    """Whether a line has a step, and numbers; only events have words."""
    if type(step := line.get("step")) is not int or not 0 <= step < 2**63:
        return False
    return isinstance(line.get("event"), str) or all(type(value) in (int, float, bool) for value in line.values())


def curve(lines: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """The steps and values of one metric.

    Example:
        >>> curve([{"step": 0, "val_loss": 5.5}, {"step": 1, "loss": 5.4}, {"step": 9, "val_loss": 3.0}], "val_loss")
        ([0, 9], [5.5, 3.0])
    """
    points = [(line["step"], line[name]) for line in lines if name in line and "event" not in line]
    return [step for step, _ in points], [value for _, value in points]


def plot_loss(lines: list[dict[str, Any]], path: Path, *, unit: str = "token"):
    """Draws the training and validation loss over steps as a PNG.

    Args:
        lines: From `MetricsLog.lines`.
        path: The PNG file.
        unit: What a token is.

    Raises:
        ImportError: matplotlib is not installed (extra ``viz``).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=f"loss (nats per {unit})")
    axes.plot(*curve(lines, "loss"), color="tab:blue", alpha=0.6, linewidth=1, label="train")
    axes.plot(*curve(lines, "val_loss"), color="tab:orange", marker="o", markersize=3, label="validation")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
