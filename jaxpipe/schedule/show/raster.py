"""PNG: the timelines of `svg`, drawn by matplotlib, which is imported only here and only when a PNG is asked for."""

import io
from collections.abc import Sequence

from jaxpipe.errors import ConfigError
from jaxpipe.schedule.costs import Costs
from jaxpipe.schedule.show.timeline import FILL, INK, Drawable, Timeline, axis_step, timelines
from jaxpipe.schedule.show.vector import (
    BOTTOM,
    BOX,
    EDGE,
    IDLE,
    LEFT,
    LEGEND,
    RIGHT,
    ROW,
    TOP,
    label_size,
    legend_entries,
    legend_note,
    pixels_per_time,
    repeat_marks,
    words_width,
)
from jaxpipe.schedule.simulate import Runtime

POINT = 0.72
"""Points per pixel of the layout, so that a layout pixel is a hundredth of an inch."""


def png(
    what: "Drawable | Sequence[Drawable]",
    costs: Costs | None = None,
    runtime: Runtime = "async",
) -> bytes:
    """Timelines to scale as one PNG picture, 150 dots per inch.

    Args:
        what: A schedule, tick table or timeline, or several, which are drawn one above the other on one time axis.
        costs: Times of the phases, by default 1 each.
        runtime: Of schedules, as in `simulate`.

    Returns:
        The bytes of the file.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("a PNG needs matplotlib; try pip install 'jaxpipe[viz]', or an .svg") from error
    lines = timelines(what, costs, runtime)
    scale = pixels_per_time(lines)
    longest = max(line.length for line in lines) or 1.0
    width = max(LEFT + longest * scale + RIGHT, 1.12 * words_width(lines))  # its own font is a wide one
    height = sum(TOP + line.schedule.devices * ROW + BOTTOM for line in lines) + LEGEND
    figure = Figure(figsize=(width / 100, height / 100), dpi=150)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    y = 0.0
    for line in lines:
        _one(axes, line, y, scale)
        y += TOP + line.schedule.devices * ROW + BOTTOM
    _legend(axes, lines, y + 12)
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor="white")
    return file.getvalue()


def _one(axes, line: Timeline, top: float, scale: float) -> None:
    from matplotlib.collections import LineCollection

    axes.text(12, top + 18, line.title, fontsize=16 * POINT, weight="bold", va="center")
    axes.text(12, top + 40, line.caption, fontsize=12 * POINT, color="#333", va="center")
    first, end = top + TOP, LEFT + line.length * scale
    for device, row in enumerate(line.busy):
        y = first + device * ROW
        axes.text(12, y + BOX / 2, f"device {device}", fontsize=12 * POINT, va="center")
        axes.text(end + 8, y + BOX / 2, f"peak {line.peaks[device]:.4g} A", fontsize=12 * POINT, va="center")
        axes.broken_barh([(LEFT, line.length * scale)], (y, BOX), facecolor=IDLE, edgecolor=EDGE, linewidth=0.4)
        for phase in FILL:
            spans = [(LEFT + s * scale, (e - s) * scale) for s, e, action in row if action.phase == phase]
            axes.broken_barh(spans, (y, BOX), facecolor=FILL[phase], edgecolor="white", linewidth=0.4, zorder=3)
        _labels(axes, line, device, y, scale)
    for dashed in (False, True):
        hops = [hop for hop in line.hops if (hop.action.phase != "F") == dashed]
        ends = [
            [
                (LEFT + hop.start * scale, first + hop.sender * ROW + (BOX if hop.receiver > hop.sender else 0)),
                (LEFT + hop.end * scale, first + hop.receiver * ROW + (0 if hop.receiver > hop.sender else BOX)),
            ]
            for hop in hops
        ]
        style = (0, (4, 2.5)) if dashed else "solid"
        axes.add_collection(
            LineCollection(ends, colors="#333", alpha=0.6, linewidths=0.6, linestyles=[style], zorder=2)
        )
    _axis(axes, line, first + line.schedule.devices * ROW, scale)


def _labels(axes, line: Timeline, device: int, y: float, scale: float) -> None:
    lift = 2 if line.schedule.repeats > 1 else 0
    for start, end, action in line.busy[device]:
        x, wide = LEFT + start * scale, (end - start) * scale
        ink, label = INK[action.phase], str(action.microbatch)
        for mark in range(repeat_marks(line.schedule.repeat_of(action.stage))):
            level = y + BOX - 3 - 2.5 * mark
            axes.plot((x + 0.2 * wide, x + 0.8 * wide), (level, level), color=ink, linewidth=0.7, zorder=4)
        size = label_size(wide, len(label))
        if size is not None:
            middle = (x + wide / 2, y + BOX / 2 - lift)
            axes.text(*middle, label, fontsize=size * POINT, color=ink, ha="center", va="center_baseline", zorder=5)


def _axis(axes, line: Timeline, y: float, scale: float) -> None:
    step = axis_step(line.length, max(2, int(line.length * scale / 90)))
    axes.plot((LEFT, LEFT + line.length * scale), (y, y), color="#555", linewidth=0.7)
    mark = 0
    while mark * step <= line.length * 1.0001 and mark < 1000:
        x = LEFT + mark * step * scale
        axes.plot((x, x), (y, y + 4), color="#555", linewidth=0.7)
        axes.text(x, y + 12, f"{mark * step:.6g}", fontsize=10 * POINT, color="#333", ha="center", va="center")
        mark += 1


def _legend(axes, lines: Sequence[Timeline], y: float) -> None:
    x = 12.0
    for kind, words in legend_entries(lines):
        if kind.endswith("hop"):
            style = "solid" if kind == "hop" else (0, (4, 2.5))
            axes.plot((x, x + 16), (y - 6, y + 6), color="#333", linewidth=0.8, linestyle=style)
        else:
            fill, edge = (FILL[kind], "none") if kind in FILL else (IDLE, EDGE)
            axes.broken_barh([(x, 16)], (y - 7, 14), facecolor=fill, edgecolor=edge, linewidth=0.4)
        x += 22
        axes.text(x, y, words, fontsize=12 * POINT, color="#222", va="center")
        x += 18 + 7.2 * len(words)
    axes.text(12, y + 22, legend_note(lines), fontsize=12 * POINT, color="#333", va="center")
