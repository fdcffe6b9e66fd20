"""One HTML page of a run: curves, numbers, timetable, memory and config. One file, no network, no script."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from jaxpipe.train.report.metrics import curve
from jaxpipe.train.report.summary import Summary

WIDTH, HEIGHT = 640, 220
LEFT, BOTTOM, TOP = 64, 24, 12
COLORS = ("#1f77b4", "#ff7f0e")
CURVES = (
    ("Loss", ("loss", "val_loss")),
    ("Auxiliary losses of experts: what they add to the loss, and the router's", ("aux_loss", "z_loss")),
    ("Share of choices that found their expert full", ("drop_rate",)),
    ("Gradient norm", ("grad_norm",)),
    ("Learning rate", ("lr",)),
    ("Tokens per second", ("tokens_per_s",)),
    ("Step time and the part spent on making batches, in seconds", ("step_time_s", "data_time_s")),
    ("Share of the devices' peak", ("mfu",)),
    ("Share of the step in which a device waits", ("bubble",)),
)
"""Headings, and the metrics that share a plot."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1360px; padding: 0 1rem; color: #222; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(520px, 1fr)); gap: 0 2rem; }
svg { max-width: 100%; height: auto; } table { border-collapse: collapse; }
td { padding: .15rem 1.2rem .15rem 0; vertical-align: top; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; }
"""


def write_page(path: Path, run: Any, lines: Sequence[dict[str, Any]], summary: Summary | None) -> None:
    """Writes the page.

    Args:
        path: The file.
        run: The `Assembly`.
        lines: From `MetricsLog.lines`.
        summary: The end of the run, or None where it failed.

    Raises:
        OSError: The file cannot be written.
    """
    path.write_text(page(run, lines, summary), encoding="utf-8")


def page(run: Any, lines: Sequence[dict[str, Any]], summary: Summary | None) -> str:
    """The page as text, see `write_page`."""
    title = f"Run {run.config.train.out}"
    parts = [f"<h1>{escape(title)}</h1><pre>{escape(run.describe())}</pre>"]
    if summary is not None:
        parts.append(f"<h2>Summary</h2>{table(summary.rows())}")
    else:
        parts.append("<p>The run failed; these are its numbers up to there.</p>")
    drawn = []
    for heading, names in CURVES:
        if points := _points(lines, names):
            drawn.append(f"<div><h2>{escape(heading)}</h2>{plot(points, names)}</div>")
    parts.append(f'<div class="plots">{"".join(drawn)}</div>')
    events = [(str(line["step"]), _event(line)) for line in lines if "event" in line]
    if events:
        parts.append(f"<h2>Events</h2>{table(events)}")
    parts.append(f"<h2>Timetable</h2>{_inner_svg(run.timetable_svg())}")
    memory = summary.memory_bytes if summary is not None else ()
    if memory:
        rows = [(f"device {number}", f"{size:,} bytes") for number, size in enumerate(memory)]
        parts.append(f"<h2>Memory</h2>{table(rows)}")
    parts.append(f"<h2>Config</h2><pre>{escape(run.config.to_toml())}</pre>")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns of text."""
    return "<table>" + "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in rows) + "</table>"


def plot(curves: Sequence[tuple[Sequence[float], Sequence[float]]], names: Sequence[str]) -> str:
    """Curves over steps as SVG.

    Args:
        curves: Steps and finite values of each, at least one point in all.
        names: What the curves are called.

    Example:
        >>> plot([([1, 2], [3.0, 4.0])], ["loss"]).count("<polyline")
        1
    """
    steps = [step for own, _ in curves for step in own]
    values = [value for _, own in curves for value in own]
    low, high = min(values), max(values)
    pad = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    low, high, first, last = low - pad, high + pad, min(steps), max(max(steps), min(steps) + 1)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - 10)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" font-size="11" font-family="sans-serif" fill="#444">']
    for n in range(5):
        value = low + (high - low) * n / 4
        out.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - 10}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for n in range(5):
        step = round(first + (last - first) * n / 4)
        out.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{step}</text>')
    for (own, numbers), name, color in zip(curves, names, COLORS, strict=False):
        points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in zip(own, numbers, strict=True))
        out.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.3"/>')
        if len(curves) > 1:
            place = WIDTH - 14 - 90 * list(names).index(name)
            out.append(f'<text x="{place}" y="{TOP + 8}" text-anchor="end" fill="{color}">{escape(name)}</text>')
    return "".join([*out, "</svg>"])


def _points(lines: Sequence[dict[str, Any]], names: Sequence[str]) -> list[tuple[list[float], list[float]]]:
    """The curves, without numbers that cannot be drawn; empty where there is nothing to draw."""
    found = []
    for name in names:
        steps, values = curve(list(lines), name)
        kept = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        found.append(([step for step, _ in kept], [value for _, value in kept]))
    return found if any(steps for steps, _ in found) else []


def _event(line: dict[str, Any]) -> str:
    rest = ", ".join(f"{name} {value}" for name, value in line.items() if name not in ("step", "event"))
    return f"{line['event']}{': ' if rest else ''}{rest}"


def _inner_svg(text: str) -> str:
    """An SVG file as part of a page: without its declaration."""
    return text[text.index("<svg") :]
