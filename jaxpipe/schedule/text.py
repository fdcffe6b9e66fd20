"""Schedules as files: CSV (also the compute-only files of torch.distributed.pipelining), JSON, and the printed grid.

A CSV has one row per device and one cell per action; a blank cell is an idle place:

    cell    ``""``, an action, or ``"(" action ";" action ")OVERLAP_F_B"``
    action  STAGE KIND MICROBATCH, KIND one of F, B, I, W

Where stages live is not declared. It follows from which row holds a stage and must be `loop` or `v`. An OVERLAP pair is
read as its two actions in order. Rows and cells are counted from 0 in every message, so that a row is a device.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jaxpipe.errors import ScheduleError
from jaxpipe.schedule.costs import Costs
from jaxpipe.schedule.ir import Action, Placement, Schedule
from jaxpipe.schedule.show.grids import cells_of
from jaxpipe.schedule.verify import BrokenRule, verify

_ACTION = re.compile(r"(?:0|[1-9][0-9]{0,8})[FBIW](?:0|[1-9][0-9]{0,8})")
_PAIR = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")
_TITLE = re.compile(r"(.*) P=([1-9][0-9]{0,5}) M=([1-9][0-9]{0,8}) V=([1-9][0-9]{0,5}) (loop|v)")

FORMAT, VERSION = "jaxpipe.schedule", 1
"""What the JSON form calls itself."""


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
    content, stem = _content(source, "csv")
    rows = [_read_row(line, row) for row, line in enumerate(_lines(content))]
    if not any(rows):
        raise ScheduleError("the CSV holds no action; one row per device must read like 0F0,0F1,0B0,0B1")
    _check_twice(rows)
    stages, placement = _placement(rows)
    microbatches = _microbatches(rows)
    for row, cells in enumerate(rows):
        for cell in cells:
            if cell.action.microbatch >= microbatches:
                _fail(row, cell.column, str(cell.action), f"its microbatch must be in 0..{microbatches - 1}")
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


def parse(printed: str) -> Schedule:
    """Reads what `str(schedule)` prints: ``parse(str(s)) == s``.

    The order is taken as it stands, right or wrong; `verify` says which.

    Args:
        printed: A title line and one line of cells per device; `.` is an idle place.

    Raises:
        ScheduleError: The title, the number of rows or a cell cannot be read.

    Example:
        >>> s = parse('''gpipe P=2 M=1 V=1 loop
        ... 0F0 .   .   0B0
        ... .   1F0 1B0 .''')
        >>> [str(action) for action in s.order[1]]
        ['1F0', '1B0']
    """
    title, *rows = printed.split("\n")
    match = _TITLE.fullmatch(title)
    if match is None:
        raise ScheduleError(f"title {title!r} must read NAME P=devices M=microbatches V=repeats loop or v")
    name, *numbers, placement = match.groups()
    devices, microbatches, repeats = map(int, numbers)
    while len(rows) > devices and not rows[-1].strip():
        rows.pop()
    if len(rows) != devices:
        raise ScheduleError(f"the grid has {len(rows)} rows but must have one for each of P={devices} devices")
    order = tuple(
        tuple(_read_action(word, row, column) for column, word in enumerate(line.split()) if word != ".")
        for row, line in enumerate(rows)
    )
    return Schedule(name, devices, microbatches, repeats, placement, order)  # pyright: ignore[reportArgumentType]


def to_json(schedule: Schedule, costs: Costs | None = None) -> str:
    """The JSON form: the order, and the costs if there are any."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "name": schedule.name,
        "devices": schedule.devices,
        "microbatches": schedule.microbatches,
        "repeats": schedule.repeats,
        "placement": schedule.placement,
        "order": [[str(action) for action in row] for row in schedule.order],
    }
    if costs is not None:
        content["costs"] = asdict(costs)
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def from_json(source: str | os.PathLike[str]) -> tuple[Schedule, Costs | None]:
    """Reads and verifies the JSON form.

    Args:
        source: A path, or the text itself (anything that starts with ``{``).

    Returns:
        The schedule, and its costs or None.

    Raises:
        ScheduleError: The text is no such JSON, or the schedule does not verify.

    Example:
        >>> from jaxpipe.schedule import build
        >>> s = build("1f1b", devices=2, microbatches=4)
        >>> from_json(to_json(s, Costs(hop=0.1))) == (s, Costs(hop=0.1))
        True
    """
    content, stem = _content(source, "json")
    try:
        read = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ScheduleError(f"{stem} is not JSON: {error}") from error
    if not isinstance(read, dict) or (read.get("format"), read.get("version")) != (FORMAT, VERSION):
        raise ScheduleError(f'the JSON must hold "format": "{FORMAT}" and "version": {VERSION}, as to_json writes it')
    for key, kind in {"name": str, "devices": int, "microbatches": int, "repeats": int, "order": list}.items():
        value = read.get(key)
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 1):
            raise ScheduleError(f"{key}={value!r} must be a {'positive int' if kind is int else kind.__name__}")
    if read.get("placement") not in ("loop", "v"):
        raise ScheduleError(f"placement={read.get('placement')!r} must be 'loop' or 'v'; try 'loop'")
    if not all(isinstance(row, list) and all(isinstance(cell, str) for cell in row) for row in read["order"]):
        raise ScheduleError("order must be a list of lists of actions such as '0F0'")
    order = tuple(
        tuple(_read_action(cell, row, column) for column, cell in enumerate(cells))
        for row, cells in enumerate(read["order"])
    )
    schedule = Schedule(read["name"], read["devices"], read["microbatches"], read["repeats"], read["placement"], order)
    return verify(schedule), _read_costs(read["costs"]) if "costs" in read else None


def _read_costs(read: object) -> Costs:
    known = [field.name for field in fields(Costs)]
    if not isinstance(read, dict) or not set(read) <= set(known):
        raise ScheduleError(f"costs={read!r} must hold only {', '.join(known)}")
    for name, value in read.items():
        for number in value if isinstance(value, list) and value and name not in ("hop", "head") else [value]:
            if not isinstance(number, int | float) or isinstance(number, bool):
                raise ScheduleError(f"costs {name}={value!r} must be a number or a list of numbers")
    priced: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in read.items()}
    return Costs(**priced)


def _content(source: str | os.PathLike[str], kind: str) -> tuple[str, str]:
    """The text, and a name for it."""
    if isinstance(source, str):
        whole = source.strip()
        is_text = "\n" in source or "," in whole or not whole or whole[0] == "{" or _ACTION.fullmatch(whole)
        if is_text and not _is_file(source):
            return source, kind
    path = Path(source)
    try:
        return path.read_text(encoding="utf-8-sig"), path.stem
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ScheduleError(f"{kind} file {str(source)!r} cannot be read: {reason}") from error


def _is_file(source: str) -> bool:
    try:
        return Path(source).is_file()
    except (OSError, ValueError):  # longer than a path may be, or with a null character
        return False


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
                cells.append(_Cell(_read_action(word, row, column), column))
        if pair is not None:
            kinds = {cells[-2].action.phase, cells[-1].action.phase}
            if kinds not in ({"F", "B"}, {"F", "I"}):
                _fail(row, column, cell, "OVERLAP_F_B must join one F and one B or I")
    return cells


def _read_action(word: str, row: int, column: int) -> Action:
    word = word.strip()
    if _ACTION.fullmatch(word) is None:
        rule = "must read STAGE, one of F B I W, MICROBATCH and nothing else, such as 0F0"
        begins = _ACTION.match(word)
        if begins is not None:
            rule += f"; {word[begins.end() :]!r} after {begins.group()} is too much"
        elif re.match(r"\d+(SEND|RECV|UNSHARD|RESHARD|REDUCE)", word):
            rule += "; export the compute-only form, without communication"
        _fail(row, column, repr(word), rule)
    return Action.parse(word)


def _check_twice(rows: Sequence[Sequence[_Cell]]) -> None:
    first: dict[Action, tuple[int, int]] = {}
    for row, cells in enumerate(rows):
        for action, column in cells:
            if action in first and first[action][0] == row:
                rule = f"an action may occur only once; it also is in cell {first[action][1]}"
                _fail(row, column, str(action), rule)
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
            raise ScheduleError(f"row {row} holds no action, but every device owns a stage")
    gap = next((stage for stage in range(stages) if stage not in places), stages)
    row, column, action = places[stages - 1]
    if gap < stages:
        _fail(row, column, str(action), f"stages must be numbered without a gap, but no row holds stage {gap}")
    if stages % devices:
        rule = f"there are {stages} stages, but their number must be a multiple of the {devices} rows"
        _fail(row, column, str(action), rule)
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
    _fail(
        row,
        cell.column,
        str(cell.action),
        f"stages must be placed as a loop (stage s in row s mod {devices}) or as a v (rows 0..{devices - 1} and back); "
        f"nearest is {nearest}, where stage {cell.action.stage} belongs to row {owner}",
    )


def _microbatches(rows: Sequence[Sequence[_Cell]]) -> int:
    """M is how many forwards most stages have, so that a number out of range is found in the cell that holds it."""
    forwards = Counter(action.stage for cells in rows for action, _ in cells if action.phase == "F")
    if not forwards:
        raise ScheduleError("the CSV holds no forward; every stage must run F for every microbatch")
    counts = Counter(forwards.values())
    return max(counts, key=lambda count: (counts[count], count))


def _fail(row: int, column: int, cell: str, rule: str) -> NoReturn:
    raise ScheduleError(f"row {row}, cell {column} {cell}: {rule}")
