"""Schedules as JSON: the order, and the costs if there are any."""

import json
import os
from dataclasses import asdict, fields
from typing import Any

from jaxpipe.documents import parse_json
from jaxpipe.errors import ScheduleError
from jaxpipe.schedule.costs import Costs
from jaxpipe.schedule.forms.reading import content_of, read_action
from jaxpipe.schedule.ir import Schedule
from jaxpipe.schedule.verify import verify

FORMAT, VERSION = "jaxpipe.schedule", 1
"""What the JSON form calls itself."""


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
    content, stem = content_of(source, "json")
    try:
        read = parse_json(content)
    except ValueError as error:
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
        tuple(read_action(cell, row, column) for column, cell in enumerate(cells))
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
