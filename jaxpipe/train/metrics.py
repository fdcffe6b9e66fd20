"""Numbers of a run as JSON lines: one object per line, written at once, readable while the run goes on.

A training line has ``step``, ``loss`` (nats per token), ``lr``, ``grad_norm`` (before clipping), ``step_time_s`` (mean
since the last line) and ``tokens_per_s``; a validation line has ``step`` and ``val_loss``. Step n means: after n
optimizer steps, except that ``loss`` and ``grad_norm`` are those the n-th step started from.
"""

import json
from pathlib import Path


class MetricsLog:
    """Appends lines to a file, and remembers them.

    Args:
        path: The file; an existing one is replaced.
    """

    def __init__(self, path: Path):
        self.lines: list[dict[str, float]] = []
        self._file = path.open("w", encoding="utf-8")

    def write(self, **values: float):
        """Writes one line, through to the operating system."""
        self.lines.append(values)
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self):
        """Closes the file; the lines stay."""
        self._file.close()


def curve(lines: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """The steps and values of one metric.

    Example:
        >>> curve([{"step": 0, "val_loss": 5.5}, {"step": 1, "loss": 5.4}, {"step": 9, "val_loss": 3.0}], "val_loss")
        ([0, 9], [5.5, 3.0])
    """
    points = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in points], [value for _, value in points]


def plot_loss(lines: list[dict[str, float]], path: Path, *, unit: str = "token"):
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
