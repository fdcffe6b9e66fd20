"""The trace-event JSON that Perfetto (ui.perfetto.dev) and chrome://tracing open."""

import json
from collections.abc import Sequence
from typing import Any

from jaxpipe.schedule.costs import Costs
from jaxpipe.schedule.rules import reads, writes
from jaxpipe.schedule.show.timeline import PHASE_NAMES, Drawable, Timeline, timelines
from jaxpipe.schedule.simulate import Runtime

UNIT = 1000.0
"""Microseconds per unit of time: one unit shows as a millisecond."""


def trace(
    what: "Drawable | Sequence[Drawable]",
    costs: Costs | None = None,
    runtime: Runtime = "async",
) -> str:
    """Timelines as trace-event JSON: one process per schedule, one thread per device, an arrow per hop.

    Args:
        what: A schedule, tick table or timeline, or several.
        costs: Times of the phases, by default 1 each. One unit of time is shown as 1 ms.
        runtime: Of schedules, as in `simulate`.

    Returns:
        The JSON text.
    """
    events = [event for process, line in enumerate(timelines(what, costs, runtime)) for event in _events(line, process)]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, ensure_ascii=False) + "\n"


def _events(line: Timeline, process: int) -> list[dict[str, Any]]:
    name = f"{line.title}: {line.caption}"
    events: list[dict[str, Any]] = [_name("process_name", name, process, 0)]
    for device, row in enumerate(line.busy):
        events.append(_name("thread_name", f"device {device}", process, device))
        events.append(
            {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": device, "args": {"sort_index": device}}
        )
        for start, end, action in row:
            args = {
                "stage": action.stage,
                "microbatch": action.microbatch,
                "repeat": line.schedule.repeat_of(action.stage),
            }
            events.append(
                {"ph": "X", "name": str(action), "cat": PHASE_NAMES[action.phase], "pid": process, "tid": device}
                | {"ts": start * UNIT, "dur": (end - start) * UNIT, "args": args}
            )
    return events + _arrows(line, process)


def _arrows(line: Timeline, process: int) -> list[dict[str, Any]]:
    """From every action to the one on another device that reads what it wrote."""
    stages = line.schedule.stages
    made = {
        value: (device, (start + end) / 2)
        for device, row in enumerate(line.busy)
        for start, end, action in row
        for value in writes(action, stages)
    }
    events = []
    for device, row in enumerate(line.busy):
        for start, _, action in row:
            for value in reads(action, stages):
                maker, when = made[value]
                if maker != device:
                    arrow = {"name": "hop", "cat": "hop", "id": f"{process}.{len(events) // 2}", "pid": process}
                    events.append(arrow | {"ph": "s", "tid": maker, "ts": when * UNIT})
                    events.append(arrow | {"ph": "f", "bp": "e", "tid": device, "ts": start * UNIT})
    return events


def _name(kind: str, name: str, process: int, thread: int) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}
