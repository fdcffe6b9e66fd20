"""Schedules as text grids of who runs what when.

The grid of a schedule packs every action as early as its order allows, all actions equally long and hops free: it shows
the order. The grid of a `TickTable` shows the ticks of the compiled loop.
"""

import re
from dataclasses import asdict
from typing import TYPE_CHECKING

from jaxpipe.schedule.ir import Action, Schedule, print_with
from jaxpipe.schedule.rules import Deadlock, Value, reads, run_order, writes

if TYPE_CHECKING:
    from jaxpipe.schedule.lowering.table import TickTable

_TERMINAL = {"F": "48;5;24;38;5;231", "W": "48;5;29;38;5;231", "B": "48;5;214;38;5;16", "I": "48;5;229;38;5;16"}
"""Background and foreground in the 256 colours of a terminal, the nearest to those of the pictures."""


@print_with
def text(schedule: Schedule) -> str:
    """The order as a text grid: one row per device, one column per unit of time, ``.`` where a device is idle.

    Example:
        >>> from jaxpipe.schedule import build
        >>> print(text(build("gpipe", devices=2, microbatches=2)))
        gpipe P=2 M=2 V=1 loop
        0F0 0F1 .   .   0B0 0B1
        .   1F0 1F1 1B0 1B1 .
    """
    return f"{title(schedule)}\n{grid(schedule)}"


def grid(schedule: Schedule, mark: tuple[int, int | None] | None = None) -> str:
    """The rows of `text`. `mark` is (row, cell): that cell is shown in >brackets<; cell None marks the whole row.

    A schedule that deadlocks is shown as far as it runs, the rest in order.
    """
    cells = cells_of(schedule)
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
        [("+".join(map(str, row[d])) or ".") for row in tick_actions(table)] for d in range(table.schedule.devices)
    ]
    slots = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in asdict(table.slots).items())
    head = f"{title(table.schedule)}, {table.packing} packing: {table.ticks} ticks, slots: {slots}"
    return "\n".join([head, _align([[str(tick) for tick in range(table.ticks)], *cells]), *table.notes])


def coloured(printed: str) -> str:
    """A text grid for a terminal: every action on the colour of its phase. The letters still tell the phases apart."""

    def paint(match: re.Match[str]) -> str:
        return f"\x1b[{_TERMINAL[match[1]]}m{match[0]}\x1b[0m"

    head, *rows = printed.split("\n")
    return "\n".join([f"\x1b[1m{head}\x1b[0m", *(re.sub(r"\b\d+([FBIW])\d+\b", paint, row) for row in rows)])


def title(schedule: Schedule) -> str:
    """Name and shape, the first line of every picture."""
    return f"{schedule.name} P={schedule.devices} M={schedule.microbatches} V={schedule.repeats} {schedule.placement}"


def cells_of(schedule: Schedule) -> list[list[str]]:
    """Per device its cells, each action at its earliest unit of time; after a deadlock the remaining ones in order."""
    starts, done = _starts(schedule)
    length = max((start + 1 for row in starts for start in row), default=0)
    cells = [["."] * length for _ in schedule.order]
    for row, actions in enumerate(schedule.order):
        for start, action in zip(starts[row], actions, strict=False):
            cells[row][start] = str(action)
        cells[row] += map(str, actions[done[row] :])
    return cells


def tick_actions(table: "TickTable") -> list[list[list[Action]]]:
    """``[tick][device]`` -> the actions of that tick in the order of their lanes: F, then B or I, then W."""
    schedule = table.schedule
    present = {action for actions in schedule.order for action in actions}
    rows = []
    for tick in range(table.ticks):
        row = []
        for device in range(schedule.devices):
            actions = []
            for lane, phases in (("f", "F"), ("b", "BI"), ("w", "W")):
                repeat = table.columns[f"{lane}_repeat"][tick][device] if f"{lane}_repeat" in table.columns else -1
                if repeat >= 0:
                    microbatch = table.columns[f"{lane}_microbatch"][tick][device]
                    stage = schedule.stage_at(device, repeat)
                    actions += [a for phase in phases if (a := Action(stage, phase, microbatch)) in present]  # pyright: ignore[reportArgumentType]
            row.append(actions)
        rows.append(row)
    return rows


def _align(cells: list[list[str]]) -> str:
    """Pads cells to common columns."""
    columns = max(map(len, cells))
    widths = [max((len(row[c]) for row in cells if c < len(row)), default=0) for c in range(columns)]
    return "\n".join(
        " ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in cells
    )


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
