"""A legal schedule with one action touched, in every way there is: `verify` and the readers name that action."""

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from jaxpipe.errors import ScheduleError
from jaxpipe.schedule import CATALOG, Action, Schedule, build, from_csv, from_json, parse, to_json, verify
from jaxpipe.schedule.forms.grids import title
from jaxpipe.schedule.ir import PHASES

Mutation = tuple[str, set[str], Schedule]
"""The kind, the texts of the action before and after, and what has become of the schedule."""


def with_row(schedule: Schedule, device: int, row: list[Action]) -> Schedule:
    return replace(schedule, order=(*schedule.order[:device], tuple(row), *schedule.order[device + 1 :]))


def mutations(schedule: Schedule, device: int, cell: int, rng: random.Random) -> Iterator[Mutation]:
    """All ways to touch the action in a cell; where it goes, and which number it gets, is drawn."""
    row = list(schedule.order[device])
    action = row[cell]
    rest = row[:cell] + row[cell + 1 :]

    def put(where: list[Action], what: Action) -> list[Action]:
        at = rng.randrange(len(where) + 1)
        return [*where[:at], what, *where[at:]]

    own = {str(action)}
    yield "dropped", own, with_row(schedule, device, rest)
    yield "doubled", own, with_row(schedule, device, put(row, action))
    yield "moved", own, with_row(schedule, device, put(rest, action))
    for other in {*range(schedule.devices)} - {device}:
        without = with_row(schedule, device, rest)
        yield "on another device", own, with_row(without, other, put(list(schedule.order[other]), action))
        yield "doubled there", own, with_row(schedule, other, put(list(schedule.order[other]), action))
    m, s = schedule.microbatches, schedule.stages
    changed = {
        "phase": [replace(action, phase=phase) for phase in PHASES],
        "microbatch": [replace(action, microbatch=n) for n in {rng.randrange(m), m, m + 3}],
        "stage": [replace(action, stage=n) for n in {rng.randrange(s), s, s + 3}],
    }
    for kind, others in changed.items():
        for other in others:
            if other != action:
                yield kind, {*own, str(other)}, with_row(schedule, device, [*row[:cell], other, *row[cell + 1 :]])


def cases(count: int) -> Iterator[tuple[Schedule, int, int, random.Random]]:
    rng = random.Random(0)
    for _ in range(count):
        name = rng.choice(sorted(CATALOG))
        family, devices = CATALOG[name], rng.randint(1, 4)
        microbatches = max(1, family.least[0] * devices + family.least[1]) + rng.randint(0, 4)
        repeats = family.repeats or rng.randint(1, 3)
        schedule = build(name, devices=devices, microbatches=microbatches, repeats=repeats)
        device = rng.randrange(devices)
        yield schedule, device, rng.randrange(len(schedule.order[device])), rng


def as_csv(schedule: Schedule) -> str:
    return "".join(",".join(map(str, row)) + "\n" for row in schedule.order)


def as_printed(schedule: Schedule) -> str:
    return "\n".join([title(schedule), *(" ".join(map(str, row)) for row in schedule.order)])


READERS = {
    "verify": verify,
    "csv": lambda schedule: from_csv(as_csv(schedule)),
    "json": lambda schedule: from_json(to_json(schedule)),
    "printed": lambda schedule: verify(parse(as_printed(schedule))),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_refusal_names_the_action_that_was_touched(reader):
    refused: Counter[str] = Counter()
    for schedule, device, cell, rng in cases(150):
        for kind, texts, mutant in mutations(schedule, device, cell, rng):
            try:
                READERS[reader](mutant)
            except ScheduleError as error:
                refused[kind] += 1
                first = str(error).partition("\n")[0]
                assert texts & set(re.findall(r"\d+[FBIW]\d+", first)), f"{kind} {texts}: {first}\n{as_printed(mutant)}"
                assert re.search(r"\b(row|device) \d", first) or "holds no forward" in first
    kinds = {"dropped", "doubled", "moved", "on another device", "doubled there", "phase", "microbatch", "stage"}
    assert set(refused) == kinds and all(count > 50 for count in refused.values())


def test_two_devices_that_wait_for_each_other_are_both_named():
    order = ("0F0 0B0 0F1 0B1", "1F1 1B1 1F0 1B0")
    rows = tuple(tuple(map(Action.parse, row.split())) for row in order)
    with pytest.raises(ScheduleError) as error:
        verify(Schedule("by hand", 2, 2, 1, "loop", rows))
    assert str(error.value).partition("\n")[0] == (
        "row 0, cell 1 0B0: needs B or I of stage 1, microbatch 0 before it, which device 1 never reaches: 1B0 is "
        "behind 1F1, and 1F1 needs F of stage 0, microbatch 1 before it, which device 0 never reaches: 0F1 is "
        "behind 0B0 (deadlock)"
    )


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ((("0F0", "0B0"),), "row 0, cell 0 is '0F0' but must be an Action; try Action.parse('0F0')"),
        ((((0, "F", 0),),), "row 0, cell 0 is (0, 'F', 0) but must be an Action; try Action(0, 'F', 0)"),
        (((Action("0", "F", 0),),), "row 0, cell 0 0F0: stage='0' must be an int; try 0"),  # pyright: ignore
        (((Action(0, "F", 0.0),),), "row 0, cell 0 0F0.0: microbatch=0.0 must be an int; try 0"),  # pyright: ignore
    ],
)
def test_cells_that_are_no_actions(order, message):
    with pytest.raises(ScheduleError) as error:
        verify(Schedule("by hand", 1, 1, 1, "loop", order))
    assert str(error.value) == message


def test_a_name_is_no_schedule():
    with pytest.raises(ScheduleError) as error:
        verify("1f1b")  # pyright: ignore[reportArgumentType]
    assert str(error.value) == (
        "schedule is '1f1b' but must be a Schedule; try jaxpipe.schedule.build('1f1b', devices=…, microbatches=…)"
    )
