"""Schedules as pictures: a text grid of who runs what when, and an SVG timetable.

The grid of a schedule packs every action as early as its order allows, all actions equally long and hops free: it shows
the order. The grid of a `TickTable` shows the ticks of the compiled loop.
"""

from html import escape
from typing import TYPE_CHECKING

from jaxpipe.schedule.ir import Action, Schedule
from jaxpipe.schedule.rules import Deadlock, Value, reads, run_order, writes

if TYPE_CHECKING:
    from jaxpipe.schedule.lower import TickTable

FILL = {"F": "#3b6fb6", "B": "#e69f00", "I": "#e9b949", "W": "#7a7a7a"}
"""Colours that stay apart for colour-blind readers and in grey print (after Okabe and Ito 2008)."""


def text(schedule: Schedule) -> str:
    """The order as a text grid: one row per device, one column per unit of time, `.` where a device is idle.

    Example:
        >>> from jaxpipe.schedule import build
        >>> print(text(build("gpipe", devices=2, microbatches=2)))
        gpipe P=2 M=2 V=1 loop
        0F0 0F1 .   .   0B0 0B1
        .   1F0 1F1 1B0 1B1 .
    """
    return f"{_title(schedule)}\n{grid(schedule)}"


def grid(schedule: Schedule, mark: tuple[int, int | None] | None = None) -> str:
    """The rows of `text`. `mark` is (row, cell): that cell is shown in >brackets<; cell None marks the whole row.

    A schedule that deadlocks is shown as far as it runs, the rest in order.
    """
    cells = _timeline(schedule)
    if mark is not None:
        row, cell = mark
        if cell is None:
            cells[row].append("<" * 3)
        else:
            nth = [place for place, content in enumerate(cells[row]) if content != "."][cell]
            cells[row][nth] = f">{cells[row][nth]}<"
    return _align(cells)


def table_text(table: "TickTable") -> str:
    """The ticks of the compiled loop as a text grid, with slots and notes.

    A cell shows the actions that a device runs in that tick, forward first.
    """
    cells = [
        [("+".join(map(str, row[d])) or ".") for row in _tick_actions(table)] for d in range(table.schedule.devices)
    ]
    slots = table.slots
    head = (
        f"{_title(table.schedule)}, {table.packing} packing: {table.ticks} ticks, slots: {slots.activation} activation, "
        f"{slots.residual} residual, {slots.gradient} gradient"
    )
    return "\n".join([head, _align([[str(tick) for tick in range(table.ticks)], *cells]), *table.notes])


def svg(what: "Schedule | TickTable") -> str:
    """A timetable as a self-contained SVG document.

    Args:
        what: A schedule (actions equally long, as early as possible) or a tick table (each tick drawn with its lanes one
            after the other).

    Returns:
        The SVG text.
    """
    schedule = what if isinstance(what, Schedule) else what.schedule
    boxes = _schedule_boxes(what) if isinstance(what, Schedule) else _table_boxes(what)
    length = max(start + width for start, width, _, _ in boxes)
    scale = max(14.0, min(40.0, 1400 / length))
    row, left, top = 30, 78, 58
    width, height = max(left + length * scale + 20, 560), top + schedule.devices * row + 34
    idle = 1 - sum(w for _, w, _, _ in boxes) / (length * schedule.devices)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="Helvetica, Arial, sans-serif">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
        f'<text x="12" y="22" font-size="15" font-weight="bold">{escape(_title(schedule))}</text>',
        f'<text x="12" y="42" font-size="12" fill="#444">idle share {idle:.1%} when all actions take equally long</text>',
    ]
    for device in range(schedule.devices):
        y = top + device * row
        parts.append(f'<text x="12" y="{y + 18}" font-size="12">device {device}</text>')
        parts.append(
            f'<rect x="{left}" y="{y}" width="{length * scale:.1f}" height="{row - 6}" fill="#f2f2f2" stroke="#ddd"/>'
        )
    size = min(12.0, scale * 0.42)
    for start, span, device, action in boxes:
        x, y, wide = left + start * scale, top + device * row, span * scale
        shade = 1.0 - 0.55 * schedule.repeat_of(action.stage) / max(1, schedule.repeats)
        dark = action.phase in "FW" and shade > 0.7
        parts.append(
            f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{row - 6}" fill="{FILL[action.phase]}" '
            f'fill-opacity="{shade:.2f}" stroke="white"><title>{action} (stage {action.stage}, microbatch '
            f"{action.microbatch})</title></rect>"
        )
        parts.append(
            f'<text x="{x + wide / 2:.1f}" y="{y + 17}" font-size="{size:.1f}" text-anchor="middle" '
            f'fill="{"white" if dark else "black"}">{action.microbatch}</text>'
        )
    parts += _legend(schedule, top + schedule.devices * row + 16)
    return "\n".join([*parts, "</svg>", ""])


def _legend(schedule: Schedule, y: float) -> list[str]:
    names = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
    parts, x = [], 12
    for phase in (p for p in "FBIW" if p in schedule.phases):
        parts.append(f'<rect x="{x}" y="{y - 11}" width="14" height="14" fill="{FILL[phase]}"/>')
        parts.append(f'<text x="{x + 19}" y="{y}" font-size="12">{names[phase]}</text>')
        x += 40 + 7 * len(names[phase])
    note = "numbers are microbatches" + ("; later repeats are lighter" if schedule.repeats > 1 else "")
    return [*parts, f'<text x="{x}" y="{y}" font-size="12" fill="#444">{note}</text>']


def _title(schedule: Schedule) -> str:
    return f"{schedule.name} P={schedule.devices} M={schedule.microbatches} V={schedule.repeats} {schedule.placement}"


def _align(cells: list[list[str]]) -> str:
    """Pads cells to common columns."""
    columns = max(map(len, cells))
    widths = [max((len(row[c]) for row in cells if c < len(row)), default=0) for c in range(columns)]
    return "\n".join(
        " ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in cells
    )


def _timeline(schedule: Schedule) -> list[list[str]]:
    """Per device its cells, each action at its earliest unit of time; after a deadlock the remaining ones in order."""
    starts, done = _starts(schedule)
    length = max((start + 1 for row in starts for start in row), default=0)
    cells = [["."] * length for _ in schedule.order]
    for row, actions in enumerate(schedule.order):
        for start, action in zip(starts[row], actions, strict=False):
            cells[row][start] = str(action)
        cells[row] += map(str, actions[done[row] :])
    return cells


def _starts(schedule: Schedule) -> tuple[list[list[int]], list[int]]:
    written: dict[Value, int] = {}
    starts: list[list[int]] = [[] for _ in schedule.order]
    try:
        for device, action in run_order(schedule):
            ready = max((written[value] for value in reads(action, schedule.stages)), default=0)
            start = max(ready, starts[device][-1] + 1 if starts[device] else 0)
            starts[device].append(start)
            written.update(dict.fromkeys(writes(action, schedule.stages), start + 1))
    except Deadlock as stop:
        return starts, stop.done
    return starts, [len(row) for row in starts]


def _tick_actions(table: "TickTable") -> list[list[list[Action]]]:
    """``[tick][device]`` -> the actions of that tick, forward first."""
    rows = []
    for tick in range(table.ticks):
        row = []
        for device in range(table.schedule.devices):
            actions = []
            for lane, phase in (("f", "F"), ("b", "B")):
                repeat = table.columns[f"{lane}_repeat"][tick][device]
                if repeat >= 0:
                    stage = table.schedule.stage_at(device, repeat)
                    actions.append(Action(stage, phase, table.columns[f"{lane}_microbatch"][tick][device]))
            row.append(actions)
        rows.append(row)
    return rows


def _schedule_boxes(schedule: Schedule) -> list[tuple[float, float, int, Action]]:
    starts, _ = _starts(schedule)
    return [
        (start, 1, device, action)
        for device, actions in enumerate(schedule.order)
        for start, action in zip(starts[device], actions, strict=False)
    ]


def _table_boxes(table: "TickTable") -> list[tuple[float, float, int, Action]]:
    """Ticks one after the other, each as long as its busiest device; the lanes of a tick stand side by side."""
    boxes, now = [], 0
    for row in _tick_actions(table):
        lanes = sorted({action.phase for actions in row for action in actions}, key="FBIW".index)
        wide = max((len(actions) for actions in row), default=0)
        for device, actions in enumerate(row):
            for action in actions:
                offset = lanes.index(action.phase) if wide > 1 else 0
                boxes.append((now + offset, 1, device, action))
        now += wide
    return boxes
