"""Schedules as text: CSV, JSON and the printed grid, which is read here."""

import re

from jaxpipe.errors import ScheduleError
from jaxpipe.schedule.forms.csv_form import from_csv, to_csv
from jaxpipe.schedule.forms.json_form import from_json, to_json
from jaxpipe.schedule.forms.reading import read_action
from jaxpipe.schedule.ir import Schedule

__all__ = ["from_csv", "from_json", "parse", "to_csv", "to_json"]

_TITLE = re.compile(r"(.*) P=([1-9][0-9]{0,5}) M=([1-9][0-9]{0,8}) V=([1-9][0-9]{0,5}) (loop|v)")


def parse(printed: str) -> Schedule:
    """Reads what `str(schedule)` prints: ``parse(str(s)) == s``.

    The order is taken as it stands, right or wrong; `verify` says which.

    Args:
        printed: A title line and one line of cells per device; ``.`` is an idle place.

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
        tuple(read_action(word, row, column) for column, word in enumerate(line.split()) if word != ".")
        for row, line in enumerate(rows)
    )
    return Schedule(name, devices, microbatches, repeats, placement, order)  # pyright: ignore[reportArgumentType]
