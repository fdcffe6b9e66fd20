"""SVG: timelines to scale, as text that any browser or paper takes."""

from collections.abc import Sequence
from html import escape

from jaxpipe.schedule.costs import Costs
from jaxpipe.schedule.show.timeline import FILL, INK, PHASE_NAMES, Drawable, Timeline, axis_step, timelines
from jaxpipe.schedule.simulate import Runtime

ROW, BOX = 30, 24
"""Height of a device's row and of the boxes in it, in pixels."""

LEFT, RIGHT, TOP, BOTTOM = 84, 96, 62, 34
"""Room around the rows of one timeline: device names, peak memory, title and caption, time axis."""

LEGEND = 52
"""Height of the legend."""

WIDEST = 6000
"""Pixels that the rows may take; in a longer timeline the numbers that no longer fit are left out."""

NARROWEST = 860
"""Pixels that the rows take at least."""

IDLE, EDGE = "#fafafa", "#b8b8b8"


def svg(
    what: "Drawable | Sequence[Drawable]",
    costs: Costs | None = None,
    runtime: Runtime = "async",
) -> str:
    """Timelines to scale as one self-contained SVG document.

    Args:
        what: A schedule, tick table or timeline, or several, which are drawn one above the other on one time axis.
        costs: Times of the phases, by default 1 each.
        runtime: Of schedules, as in `simulate`.

    Returns:
        The SVG text.
    """
    lines = timelines(what, costs, runtime)
    longest = max(line.length for line in lines) or 1.0
    scale = pixels_per_time(lines)
    width = max(LEFT + longest * scale + RIGHT, words_width(lines))
    parts, y = [], 0.0
    for line in lines:
        parts += _one(line, y, scale)
        y += TOP + line.schedule.devices * ROW + BOTTOM
    parts += _legend(lines, y + 16)
    height = y + LEGEND
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="Helvetica, Arial, sans-serif">'
    )
    paper = f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>'
    return "\n".join([head, paper, *parts, "</svg>", ""])


def pixels_per_time(lines: Sequence[Timeline]) -> float:
    """Wide enough that the number in the shortest action can be read, as far as `WIDEST` allows."""
    longest = max(line.length for line in lines) or 1.0
    digits = max(len(str(line.schedule.microbatches - 1)) for line in lines)
    spans = [end - start for line in lines for row in line.busy for start, end, _ in row if end > start]
    shortest = max(min(spans, default=longest), longest / 1000)
    wanted = (3 + 5 * digits) / shortest
    return max(min(wanted, WIDEST / longest), NARROWEST / longest)


def words_width(lines: Sequence[Timeline]) -> float:
    """Room that titles, captions and legend need, on the safe side for any sans-serif font."""
    legend = sum(40 + 6.6 * len(words) for _, words in legend_entries(lines))
    rows = [max(len(line.caption) * 6.6, len(line.title) * 9.6) for line in lines]
    return 36 + max(legend, len(legend_note(lines)) * 6.6, *rows)


def label_size(span: float, digits: int) -> float | None:
    """Font size at which so many digits fit into a box of that width, or None."""
    size = min(11.0, (span - 2) / (0.58 * digits))
    return size if size >= 6 else None


def repeat_marks(repeat: int) -> int:
    """How many lines under its number mark a box as belonging to a repeat."""
    return min(repeat, 3)


def _one(line: Timeline, top: float, scale: float) -> list[str]:
    schedule = line.schedule
    parts = [
        f'<text x="12" y="{top + 24:.0f}" font-size="16" font-weight="bold">{escape(line.title)}</text>',
        f'<text x="12" y="{top + 44:.0f}" font-size="12" fill="#333">{escape(line.caption)}</text>',
    ]
    first = top + TOP
    for device in range(schedule.devices):
        y = first + device * ROW
        end = LEFT + line.length * scale
        parts.append(f'<text x="12" y="{y + 16:.0f}" font-size="12">device {device}</text>')
        parts.append(
            f'<rect x="{LEFT}" y="{y:.0f}" width="{line.length * scale:.1f}" height="{BOX}" fill="{IDLE}" '
            f'stroke="{EDGE}" stroke-width="0.5"/>'
        )
        parts.append(f'<text x="{end + 8:.1f}" y="{y + 16:.0f}" font-size="12">peak {line.peaks[device]:.4g} A</text>')
    parts += _hops(line, first, scale)  # under the boxes, so that they cross no number
    for device in range(schedule.devices):
        parts += _boxes(line, device, first + device * ROW, scale)
    return parts + _axis(line, first + schedule.devices * ROW, scale)


def _boxes(line: Timeline, device: int, y: float, scale: float) -> list[str]:
    parts = []
    for start, end, action in line.busy[device]:
        x, wide = LEFT + start * scale, (end - start) * scale
        repeat = line.schedule.repeat_of(action.stage)
        told = f"{action}: {PHASE_NAMES[action.phase]}, stage {action.stage}, microbatch {action.microbatch}"
        ink = INK[action.phase]
        parts.append(
            f'<rect x="{x:.2f}" y="{y:.0f}" width="{wide:.2f}" height="{BOX}" fill="{FILL[action.phase]}" '
            f'stroke="white" stroke-width="0.6"><title>{told}, {start:g} to {end:g}</title></rect>'
        )
        for mark in range(repeat_marks(repeat)):
            parts.append(
                f'<path d="M{x + 0.2 * wide:.2f} {y + BOX - 3 - 2.5 * mark:.1f}h{0.6 * wide:.2f}" stroke="{ink}"/>'
            )
        label = str(action.microbatch)
        size = label_size(wide, len(label))
        if size is not None:
            lift = 2 if line.schedule.repeats > 1 else 0
            parts.append(
                f'<text x="{x + wide / 2:.2f}" y="{y + BOX / 2 + size * 0.36 - lift:.1f}" font-size="{size:.1f}" '
                f'text-anchor="middle" fill="{ink}" pointer-events="none">{label}</text>'
            )
    return parts


def _hops(line: Timeline, first: float, scale: float) -> list[str]:
    """A line from where a transfer leaves to where it arrives, dashed for gradients."""
    parts = []
    for start, end, sender, receiver, action in line.hops:
        down = receiver > sender
        y1 = first + sender * ROW + (BOX if down else 0)
        y2 = first + receiver * ROW + (0 if down else BOX)
        dash = "" if action.phase == "F" else ' stroke-dasharray="3 2"'
        parts.append(
            f'<path d="M{LEFT + start * scale:.2f} {y1:.0f}L{LEFT + end * scale:.2f} {y2:.0f}" stroke="#333" '
            f'stroke-opacity="0.55" stroke-width="0.8"{dash}/>'
        )
    return parts


def _axis(line: Timeline, y: float, scale: float) -> list[str]:
    step = axis_step(line.length, max(2, int(line.length * scale / 90)))
    parts = [f'<path d="M{LEFT} {y:.0f}h{line.length * scale:.1f}" stroke="#555"/>']
    mark = 0
    while mark * step <= line.length * 1.0001 and mark < 1000:
        x = LEFT + mark * step * scale
        parts.append(f'<path d="M{x:.1f} {y:.0f}v4" stroke="#555"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{y + 15:.0f}" font-size="10" fill="#333" text-anchor="middle">'
            f"{mark * step:.6g}</text>"
        )
        mark += 1
    return parts


def legend_entries(lines: Sequence[Timeline]) -> list[tuple[str, str]]:
    """What the legend explains: (a phase, ``idle``, ``hop`` or ``gradient hop``, its words)."""
    present = {phase for line in lines for phase in line.schedule.phases}
    entries = [(phase, PHASE_NAMES[phase]) for phase in "FBIW" if phase in present]
    entries.append(("idle", "idle"))
    if any(line.hops for line in lines):
        entries += [("hop", "hop of activations"), ("gradient hop", "hop of gradients")]
    return entries


def legend_note(lines: Sequence[Timeline]) -> str:
    """The line below the legend."""
    repeats = max(line.schedule.repeats for line in lines)
    marks = ["one line below: second repeat", "two: third", "three: fourth" + (" or later" if repeats > 4 else "")]
    words = "; ".join(["numbers are microbatches", *([", ".join(marks[: repeats - 1])] if repeats > 1 else [])])
    return f"{words}; A = the activations one microbatch leaves on a device"


def _legend(lines: Sequence[Timeline], y: float) -> list[str]:
    parts = [f'<text x="12" y="{y + 22:.0f}" font-size="12" fill="#333">{legend_note(lines)}</text>']
    x = 12.0
    for kind, words in legend_entries(lines):
        if kind.endswith("hop"):
            dash = "" if kind == "hop" else ' stroke-dasharray="3 2"'
            parts.append(f'<path d="M{x:.0f} {y - 10:.0f}l16 12" stroke="#333"{dash}/>')
        else:
            fill, edge = (FILL[kind], "none") if kind in FILL else (IDLE, EDGE)
            parts.append(
                f'<rect x="{x:.0f}" y="{y - 11:.0f}" width="16" height="14" fill="{fill}" stroke="{edge}" '
                'stroke-width="0.5"/>'
            )
        x += 22
        parts.append(f'<text x="{x:.0f}" y="{y:.0f}" font-size="12" fill="#222">{words}</text>')
        x += 18 + 6.6 * len(words)
    return parts
