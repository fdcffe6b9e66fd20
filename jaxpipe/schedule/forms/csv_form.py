"""Schedules as CSV files, also the compute-only files of torch.distributed.pipelining.

A CSV has one row per device and one cell per action; a blank cell is an idle place:

    cell    ``""``, an action, or ``"(" action ";" action ")OVERLAP_F_B"``
    action  STAGE KIND MICROBATCH, KIND one of F, B, I, W

Where stages live is not declared. It follows from which row holds a stage and must be `loop` or `v`. An OVERLAP pair is
read as its two actions in order. Rows and cells are counted from 0 in every message, so that a row is a device.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from jaxpipe.errors import ScheduleError
from jaxpipe.schedule.forms.grids import cells_of
from jaxpipe.schedule.forms.reading import content_of, fail, read_action
from jaxpipe.schedule.ir import Action, Placement, Schedule
from jaxpipe.schedule.verify import BrokenRule, verify

_PAIR = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")


class _Cell(NamedTuple):
    """An action and the column of the file that holds it."""

    action: Action
    column: int


def to_csv(schedule: Schedule) -> str:
    """The CSV form: every action in the earliest column that the order allows, blank cells where a device waits.

    Example:
        >>> from jaxpipe.schedule import build
        >>> print(to_csv(build("gpipe", devices=2, microbatches=2)), end="")
        0F0,0F1,,,0B0,0B1
        ,1F0,1F1,1B0,1B1
    """
    rows = ([cell.replace(".", "") for cell in row] for row in cells_of(schedule))
    return "".join(",".join(row).rstrip(",") + "\n" for row in rows)


def from_csv(source: str | os.PathLike[str], name: str | None = None) -> Schedule:
    r"""Reads and verifies a schedule in CSV form.

    Args:
        source: A path, or the text itself (anything with a comma or a line end that is no existing file).
        name: The schedule's name; by default the file's name without its suffix, or ``csv`` for a text. On one device
            the two placements are the same and `loop` is taken.

    Returns:
        A schedule that `verify` accepts.

    Raises:
        ScheduleError: The file cannot be read, or a rule is broken; names the row, the cell and the rule.

    Example:
        >>> s = from_csv("0F0,0F1,,,0B0,0B1\n,1F0,1F1,1B0,1B1\n")
        >>> s.devices, s.microbatches, s.repeats, s.placement
        (2, 2, 1, 'loop')
    """
    content, stem = content_of(source, "csv")
    rows = [_read_row(line, row) for row, line in enumerate(_lines(content))]
    if not any(rows):
        raise ScheduleError("the CSV holds no action; one row per device must read like 0F0,0F1,0B0,0B1")
    _check_twice(rows)
    stages, placement = _placement(rows)
    microbatches = _microbatches(rows)
    for row, cells in enumerate(rows):
        for cell in cells:
            if cell.action.microbatch >= microbatches:
                stage, phase = cell.action.stage, cell.action.phase
                have = {other.action for other in cells}
                gone = [a for m in range(microbatches) if (a := Action(stage, phase, m)) not in have]
                rule = f"its microbatch must be in 0..{microbatches - 1}"
                fail(row, cell.column, str(cell.action), rule + (f", or else {gone[0]} is missing" if gone else ""))
    order = tuple(tuple(cell.action for cell in cells) for cells in rows)
    schedule = Schedule(name or stem, len(rows), microbatches, stages // len(rows), placement, order)
    try:
        return verify(schedule)
    except BrokenRule as broken:
        if broken.cell is None:
            raise
        found = rows[broken.row][broken.cell]
        where = f"row {broken.row}, cell {found.column} {found.action}"
        raise ScheduleError(f"{where}: {broken.rule}\n{broken.grid}") from broken


def _lines(content: str) -> list[str]:
    lines = content.replace("\r\n", "\n").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _read_row(line: str, row: int) -> list[_Cell]:
    cells = []
    for column, content in enumerate(line.split(",")):
        cell = content.strip()
        pair = _PAIR.fullmatch(cell)
        for word in (cell,) if pair is None else pair.groups():
            if word or pair is not None:
                cells.append(_Cell(read_action(word, row, column), column))
        if pair is not None:
            kinds = {cells[-2].action.phase, cells[-1].action.phase}
            if kinds not in ({"F", "B"}, {"F", "I"}):
                fail(row, column, cell, "OVERLAP_F_B must join one F and one B or I")
    return cells


def _check_twice(rows: Sequence[Sequence[_Cell]]) -> None:
    first: dict[Action, tuple[int, int]] = {}
    for row, cells in enumerate(rows):
        for action, column in cells:
            if action in first and first[action][0] == row:
                rule = f"an action may occur only once; it also is in cell {first[action][1]}"
                fail(row, column, str(action), rule)
            first.setdefault(action, (row, column))


def _placement(rows: Sequence[Sequence[_Cell]]) -> tuple[int, Placement]:
    """The number of stages and where they live, from the rows in which they occur."""
    devices = len(rows)
    places: dict[int, tuple[int, int, Action]] = {}
    for row, cells in enumerate(rows):
        for action, column in cells:
            places.setdefault(action.stage, (row, column, action))
    stages = max(places) + 1
    for row, cells in enumerate(rows):
        if not cells:
            raise ScheduleError(f"row {row} holds no action, but every device owns a stage; {row}F0 is missing")
    gap = next((stage for stage in range(stages) if stage not in places), stages)
    row, column, action = places[stages - 1]
    if gap < stages:
        # In both placements row s holds stage s of the first P.
        begins = f", and row {gap} begins with {rows[gap][0].action}" if gap < devices else ""
        rule = f"stages must be numbered without a gap, but no row holds stage {gap}: {gap}F0 is missing{begins}"
        fail(row, column, str(action), rule)
    if stages % devices:
        rule = f"there are {stages} stages, but their number must be a multiple of the {devices} rows"
        fail(row, column, str(action), rule)
    wrong: dict[Placement, list[tuple[int, _Cell, int]]] = {}
    for placement in ("loop", "v"):
        shape = Schedule("", devices, 1, stages // devices, placement, ())
        wrong[placement] = [
            (row, cell, shape.device_of(cell.action.stage))
            for row, cells in enumerate(rows)
            for cell in cells
            if shape.device_of(cell.action.stage) != row
        ]
        if not wrong[placement]:
            return stages, placement
    nearest = min(wrong, key=lambda placement: len(wrong[placement]))
    row, cell, owner = wrong[nearest][0]
    fail(
        row,
        cell.column,
        str(cell.action),
        f"stages must be placed as a loop (stage s in row s mod {devices}) or as a v (rows 0..{devices - 1} and back); "
        f"nearest is {nearest}, where stage {cell.action.stage} belongs to row {owner}",
    )


def _microbatches(rows: Sequence[Sequence[_Cell]]) -> int:
    """M is how many forwards, and backwards, most stages have: so a number out of range is found in its own cell."""
    passes = {"F": "forwards", "B": "backwards", "I": "backwards"}
    found = {(a.stage, passes[a.phase], a.microbatch) for cells in rows for a, _ in cells if a.phase in passes}
    if not any(kind == "forwards" for _, kind, _ in found):
        first = next(action for cells in rows for action, _ in cells)
        lacks = Action(first.stage, "F", first.microbatch)
        raise ScheduleError(f"the CSV holds no forward; {first} needs {lacks}, and every stage F for every microbatch")
    counts = Counter(Counter((stage, kind) for stage, kind, _ in found).values())
    return max(counts, key=lambda count: (counts[count] * count, count))
