"""Is a schedule complete, and can it run?

`verify` checks, in this order: every action is in range and on the device that owns its stage; none occurs twice;
none is missing (F for every stage and microbatch; then B, or I and W, for all or for none); and the devices never
wait for each other in a circle. An error shows the grid with the offending action marked.
"""

from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from jaxpipe.errors import ScheduleError
from jaxpipe.schedule.forms.grids import grid
from jaxpipe.schedule.ir import PHASES, Action, Schedule, check_schedule
from jaxpipe.schedule.rules import Deadlock, reads, run_order, writes


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
    check_schedule(schedule)
    for option in ("devices", "microbatches", "repeats"):
        if type(value := getattr(schedule, option)) is not int:
            raise ScheduleError(f"{option}={value!r} must be an int; try 1")
        if value < 1:
            raise ScheduleError(f"{option}={value} must be at least 1; try 1")
    if schedule.placement not in ("loop", "v"):
        raise ScheduleError(f"placement={schedule.placement!r} must be 'loop' or 'v'; try 'loop'")
    if len(schedule.order) != schedule.devices:
        raise ScheduleError(
            f"order has {len(schedule.order)} rows but must have one for each of devices={schedule.devices}"
        )
    _check_types(schedule)
    _check_cells(schedule)
    _check_complete(schedule)
    try:
        for _ in run_order(schedule):
            pass
    except Deadlock as stop:
        _fail_deadlock(schedule, stop.done)
    return schedule


def _check_types(schedule: Schedule) -> None:
    for row, actions in enumerate(schedule.order):
        for cell, action in enumerate(actions):
            if not isinstance(action, Action):
                near = f"Action.parse({action!r})" if isinstance(action, str) else "Action(0, 'F', 0)"
                raise ScheduleError(f"row {row}, cell {cell} is {action!r} but must be an Action; try {near}")
            for field in ("stage", "microbatch"):
                if type(getattr(action, field)) is not int:
                    number = getattr(action, field)
                    raise ScheduleError(f"row {row}, cell {cell} {action}: {field}={number!r} must be an int; try 0")


def _check_cells(schedule: Schedule) -> None:
    seen: dict[Action, int] = {}
    for row, actions in enumerate(schedule.order):
        for cell, action in enumerate(actions):
            owner = schedule.device_of(action.stage)
            rule = ""
            if action.phase not in PHASES:
                rule = f"phase {action.phase!r} must be one of {' '.join(PHASES)}"
            elif not 0 <= action.stage < schedule.stages:
                rule = f"stage {action.stage} must be in 0..{schedule.stages - 1}"
            elif not 0 <= action.microbatch < schedule.microbatches:
                rule = f"microbatch {action.microbatch} must be in 0..{schedule.microbatches - 1}"
            elif owner != row:
                rule = f"stage {action.stage} belongs to device {owner}, not to device {row}"
            elif action in seen:
                rule = f"an action may occur only once; it also is in cell {seen[action]}"
            if rule:
                gone = next(_missing(schedule, row), None)
                _fail(schedule, row, cell, rule + (f", and {gone.action} is missing" if gone else ""))
            seen[action] = cell


class _Missing(NamedTuple):
    """An action that a row lacks.

    Attributes:
        action: Which.
        beside: The one that asks for it, if one does.
    """

    action: Action
    beside: Action | None = None


def _missing(schedule: Schedule, row: int) -> Iterator[_Missing]:
    """The actions that a row must have and has not."""
    have, trains = set(schedule.order[row]), schedule.phases != {"F"}
    for repeat in range(schedule.repeats):
        stage = schedule.stage_at(row, repeat)
        for m in range(schedule.microbatches):
            forward, full, inputs, weights = (Action(stage, phase, m) for phase in PHASES)
            if forward not in have:
                yield _Missing(forward)
            if (inputs in have) != (weights in have) and full not in have:
                yield _Missing(weights, inputs) if inputs in have else _Missing(inputs, weights)
            elif trains and not have & {full, inputs, weights}:
                yield _Missing(full)


def _check_complete(schedule: Schedule) -> None:
    everything = [action for actions in schedule.order for action in actions]
    backward = {(action.stage, action.microbatch) for action in everything if action.phase != "F"}
    pairs = schedule.stages * schedule.microbatches
    for row, actions in enumerate(schedule.order):
        for cell, action in enumerate(actions):
            if action.phase != "F" and 2 * len(backward) < pairs:
                rule = f"{pairs - len(backward)} of {pairs} forwards have no backward; all or none must"
                _fail(schedule, row, cell, rule)
    for row, actions in enumerate(schedule.order):
        for action in actions:
            parts = [Action(action.stage, phase, action.microbatch) for phase in ("I", "W")]
            if action.phase == "B" and set(parts) & set(actions):
                both = " and ".join(str(part) for part in parts if part in actions)
                rule = f"B already holds I and W: a microbatch has either B, or I and W, but {both} is there too"
                _fail(schedule, row, actions.index(action), rule)
        for action, beside in _missing(schedule, row):
            if beside is None:
                few = action.phase != "F" and 2 * len(backward) <= pairs
                why = f", for there is {min(a for a in everything if a.phase != 'F')}" if few else ""
                _fail(schedule, row, None, f"{action} is missing{why}")
            whole = Action(action.stage, "B", action.microbatch)
            rule = f"{action} is missing: I and W come together, and {beside} is there; or {whole} in place of both"
            _fail(schedule, row, None, rule)


def _fail_deadlock(schedule: Schedule, done: list[int]) -> None:
    """Names the circle in which devices wait for each other.

    Each device stands at an action that needs another one, which is behind the action at which its own device stands.
    An action that is out of place is always one of those: without it nobody would wait.
    """
    cells = {action: (row, cell) for row, actions in enumerate(schedule.order) for cell, action in enumerate(actions)}
    makers = {value: action for action in cells for value in writes(action, schedule.stages)}

    def needed(device: int) -> tuple[int, Action]:
        """Who makes what a device waits for: one of its own later actions if there is one."""
        action = schedule.order[device][done[device]]
        late = [makers[value] for value in reads(action, schedule.stages)]
        late = [maker for maker in late if cells[maker][1] >= done[cells[maker][0]]]
        return min((cells[maker][0] != device, cells[maker][0], maker) for maker in late)[1:]

    waiting = [d for d, count in enumerate(done) if count < len(schedule.order[d])]
    device = next((d for d in waiting if needed(d)[0] == d), waiting[0])
    circle = []
    while device not in circle:
        circle.append(device)
        device = needed(device)[0]
    circle = circle[circle.index(device) :]
    stops = [schedule.order[d][done[d]] for d in circle]
    steps = []
    for n, (d, stop) in enumerate(zip(circle, stops, strict=True)):
        other, maker = needed(d)
        phases = "B or I" if maker.phase in "BI" and maker.stage != stop.stage else maker.phase
        rule = f"needs {phases} of stage {maker.stage}, microbatch {maker.microbatch} before it"
        if other == d:
            _fail(schedule, d, done[d], f"{rule}, and {maker} is in cell {cells[maker][1]}")
        rule += f", which device {other} never reaches: {maker} is behind {stops[(n + 1) % len(stops)]}"
        steps.append(f"{stop} {rule}" if n else rule)
    _fail(schedule, circle[0], done[circle[0]], f"{', and '.join(steps)} (deadlock)")


def _fail(schedule: Schedule, row: int, cell: int | None, rule: str) -> NoReturn:
    raise BrokenRule(schedule, row, cell, rule)
