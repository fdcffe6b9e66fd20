"""Is a schedule complete, and can it run?

`verify` checks, in this order: every action is in range and on the device that owns its stage; none occurs twice;
none is missing (F for every stage and microbatch; then B, or I and W, for all or for none); and the devices never
wait for each other in a circle. An error shows the grid with the offending action marked.
"""

from typing import NoReturn

from jaxpipe.errors import ScheduleError
from jaxpipe.schedule.ir import PHASES, Action, Schedule
from jaxpipe.schedule.rules import Deadlock, Value, reads, run_order, writes
from jaxpipe.schedule.show import grid


class BrokenRule(ScheduleError):
    """A rule that an order breaks, and where.

    Attributes:
        row: The device.
        cell: Which of its actions, or None for the whole row.
        rule: What is wrong there.
        grid: The schedule as text with the place marked.
    """

    def __init__(self, schedule: Schedule, row: int, cell: int | None, rule: str):
        self.row, self.cell, self.rule = row, cell, rule
        self.grid = grid(schedule, mark=(row, cell))
        where = "" if cell is None else f", cell {cell} {schedule.order[row][cell]}"
        super().__init__(f"row {row}{where}: {rule}\n{self.grid}")


def verify(schedule: Schedule) -> Schedule:
    """Checks a schedule and returns it.

    Args:
        schedule: Any schedule, from the catalogue or made by hand.

    Returns:
        The same schedule, so that calls can be chained.

    Raises:
        ScheduleError: A rule is broken. Names the row (device), the cell and the rule, and prints the grid.

    Example:
        >>> from jaxpipe.schedule import build, verify
        >>> verify(build("1f1b", devices=2, microbatches=2)).stages
        2
    """
    for option in ("devices", "microbatches", "repeats"):
        if getattr(schedule, option) < 1:
            raise ScheduleError(f"{option}={getattr(schedule, option)} must be at least 1; try 1")
    if schedule.placement not in ("loop", "v"):
        raise ScheduleError(f"placement={schedule.placement!r} must be 'loop' or 'v'; try 'loop'")
    if len(schedule.order) != schedule.devices:
        raise ScheduleError(
            f"order has {len(schedule.order)} rows but must have one for each of devices={schedule.devices}"
        )
    _check_cells(schedule)
    _check_complete(schedule)
    try:
        for _ in run_order(schedule):
            pass
    except Deadlock as stop:
        _fail_deadlock(schedule, stop.done)
    return schedule


def _check_cells(schedule: Schedule) -> None:
    seen: set[Action] = set()
    for row, actions in enumerate(schedule.order):
        for cell, action in enumerate(actions):
            if action.phase not in PHASES:
                _fail(schedule, row, cell, f"phase {action.phase!r} must be one of {' '.join(PHASES)}")
            if not 0 <= action.stage < schedule.stages:
                _fail(schedule, row, cell, f"stage {action.stage} must be in 0..{schedule.stages - 1}")
            if not 0 <= action.microbatch < schedule.microbatches:
                _fail(schedule, row, cell, f"microbatch {action.microbatch} must be in 0..{schedule.microbatches - 1}")
            owner = schedule.device_of(action.stage)
            if owner != row:
                _fail(schedule, row, cell, f"stage {action.stage} belongs to device {owner}, not to device {row}")
            if action in seen:
                _fail(schedule, row, cell, "an action may occur only once")
            seen.add(action)


def _check_complete(schedule: Schedule) -> None:
    trains = schedule.phases != {"F"}
    for row, actions in enumerate(schedule.order):
        have = set(actions)
        for repeat in range(schedule.repeats):
            stage = schedule.stage_at(row, repeat)
            for m in range(schedule.microbatches):
                forward, full, inputs, weights = (Action(stage, phase, m) in have for phase in PHASES)
                if not forward:
                    _fail(schedule, row, None, f"{Action(stage, 'F', m)} is missing")
                if full and (inputs or weights):
                    _fail(
                        schedule,
                        row,
                        actions.index(Action(stage, "B", m)),
                        "B already holds I and W: a microbatch has either B, or I and W",
                    )
                if inputs != weights:
                    missing = Action(stage, "W" if inputs else "I", m)
                    _fail(schedule, row, None, f"{missing} is missing: I and W come together")
                if trains and not (full or inputs):
                    _fail(schedule, row, None, f"{Action(stage, 'B', m)} is missing")


def _fail_deadlock(schedule: Schedule, done: list[int]) -> None:
    """Marks a device that waits for one of its own later actions if there is one, else the first that waits."""
    waiting = [d for d, count in enumerate(done) if count < len(schedule.order[d])]
    written = {
        value
        for d, count in enumerate(done)
        for action in schedule.order[d][:count]
        for value in writes(action, schedule.stages)
    }
    missing = {d: [v for v in reads(schedule.order[d][done[d]], schedule.stages) if v not in written] for d in waiting}
    own = [d for d in waiting if any(schedule.device_of(_writer_stage(v)) == d for v in missing[d])]
    row = (own or waiting)[0]
    value = missing[row][0]
    maker = {"x": "F", "r": "F", "g": "B or I", "w": "I"}[value.kind]
    where = schedule.device_of(_writer_stage(value))
    rule = f"needs {maker} of stage {_writer_stage(value)}, microbatch {value.microbatch} before it"
    if where != row:
        rule += f", which device {where} never reaches (deadlock)"
    _fail(schedule, row, done[row], rule)


def _writer_stage(value: Value) -> int:
    return {"x": value.stage - 1, "g": value.stage + 1}.get(value.kind, value.stage)


def _fail(schedule: Schedule, row: int, cell: int | None, rule: str) -> NoReturn:
    raise BrokenRule(schedule, row, cell, rule)
