"""`verify` accepts what can run and rejects everything else, saying where."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from jaxpipe.errors import ScheduleError
from jaxpipe.schedule import CATALOG, Action, Schedule, build, verify
from jaxpipe.schedule.ir import Placement

limited = settings(derandomize=True, max_examples=120, deadline=None)


def by_hand(*rows: str, repeats: int = 1, placement: Placement = "loop", microbatches: int = 2) -> Schedule:
    order = tuple(tuple(map(Action.parse, row.split())) for row in rows)
    return Schedule("by hand", len(rows), microbatches, repeats, placement, order)


@st.composite
def schedules(draw) -> Schedule:
    name = draw(st.sampled_from(sorted(CATALOG)))
    family = CATALOG[name]
    p = draw(st.integers(1, 4))
    m = max(1, family.least[0] * p + family.least[1]) + draw(st.integers(0, 4))
    return build(name, devices=p, microbatches=m, repeats=family.repeats or draw(st.integers(1, 3)))


def with_row(schedule: Schedule, device: int, row) -> Schedule:
    return replace(schedule, order=(*schedule.order[:device], tuple(row), *schedule.order[device + 1 :]))


def pick(draw, schedule: Schedule) -> tuple[int, int]:
    device = draw(st.integers(0, schedule.devices - 1))
    return device, draw(st.integers(0, len(schedule.order[device]) - 1))


@given(st.data())
@limited
def test_a_dropped_action_is_rejected(data):
    # One stage and one microbatch without its only B is a forward-only schedule.
    schedule = data.draw(schedules().filter(lambda s: s.stages * s.microbatches > 1))
    device, cell = pick(data.draw, schedule)
    row = list(schedule.order[device])
    gone = row.pop(cell)
    with pytest.raises(ScheduleError, match=rf"row {device}\b.*missing") as error:
        verify(with_row(schedule, device, row))
    assert f"{gone.stage}" in str(error.value) and "<<<" in str(error.value)


@given(st.data())
@limited
def test_a_doubled_action_is_rejected(data):
    schedule = data.draw(schedules())
    device, cell = pick(data.draw, schedule)
    row = list(schedule.order[device])
    row.insert(data.draw(st.integers(0, len(row))), row[cell])
    with pytest.raises(ScheduleError, match=rf"row {device}, cell \d+ {row[cell]}|only once"):
        verify(with_row(schedule, device, row))


@given(st.data())
@limited
def test_an_action_on_the_wrong_device_is_rejected(data):
    schedule = data.draw(schedules().filter(lambda s: s.devices > 1))
    device, cell = pick(data.draw, schedule)
    row = list(schedule.order[device])
    action = row.pop(cell)
    other = data.draw(st.integers(0, schedule.devices - 1).filter(lambda d: d != device))
    moved = with_row(schedule, device, row)
    target = list(moved.order[other])
    target.insert(data.draw(st.integers(0, len(target))), action)
    with pytest.raises(ScheduleError, match=f"belongs to device {device}, not to device {other}"):
        verify(with_row(moved, other, target))


@given(st.data())
@limited
def test_a_swap_across_a_dependency_is_rejected(data):
    schedule = data.draw(schedules().filter(lambda s: s.phases != {"F"}))
    device, cell = pick(data.draw, schedule)
    row = list(schedule.order[device])
    action = row[cell]
    before = {"F": "BI", "B": "F", "I": "FW", "W": "I"}[action.phase]
    related = [
        n
        for n, a in enumerate(row)
        if a.phase in before and (a.stage, a.microbatch) == (action.stage, action.microbatch)
    ]
    other = data.draw(st.sampled_from(related))
    row[cell], row[other] = row[other], row[cell]
    with pytest.raises(ScheduleError, match="needs"):
        verify(with_row(schedule, device, row))


def can_run(schedule: Schedule) -> bool:
    """An oracle of its own: the graph of orders and dependencies, written down anew, has no circle."""
    last = schedule.stages - 1
    whole = "B" if "B" in schedule.phases else "I"
    needs: dict[str, set[str]] = {}
    for row in schedule.order:
        for before, action in zip((None, *row), row, strict=False):
            s, m = action.stage, action.microbatch
            wanted = {str(before)} if before else set()
            if action.phase == "F" and s > 0:
                wanted.add(f"{s - 1}F{m}")
            if action.phase in "BI":
                wanted |= {f"{s}F{m}"} | ({f"{s + 1}{whole}{m}"} if s < last else set())
            if action.phase == "W":
                wanted.add(f"{s}I{m}")
            needs[str(action)] = wanted
    while needs:
        ready = {name for name, wanted in needs.items() if not wanted & needs.keys()}
        if not ready:
            return False
        needs = {name: wanted for name, wanted in needs.items() if name not in ready}
    return True


@given(st.data(), st.integers(0, 10**6), st.integers(1, 3))
@limited
def test_random_swaps_are_judged_as_the_oracle_judges_them(data, seed, swaps):
    schedule = data.draw(schedules().filter(lambda s: s.name != "dualpipe_v"))  # mixes B with I and W
    rng = random.Random(seed)
    for _ in range(swaps):
        device = rng.randrange(schedule.devices)
        row = list(schedule.order[device])
        a, b = rng.randrange(len(row)), rng.randrange(len(row))
        row[a], row[b] = row[b], row[a]
        schedule = with_row(schedule, device, row)
    if can_run(schedule):
        verify(schedule)
    else:
        with pytest.raises(ScheduleError, match="needs"):
            verify(schedule)


def test_deadlock_across_rows_names_both_devices_and_marks_the_cell():
    with pytest.raises(ScheduleError) as error:
        verify(by_hand("0F0 0B0 0F1 0B1", "1F1 1B1 1F0 1B0"))
    text = str(error.value)
    assert "row 0, cell 1 0B0: needs B or I of stage 1, microbatch 0 before it, which device 1 never reaches" in text
    assert ">0B0<" in text


def test_own_order_is_blamed_before_what_it_blocks():
    with pytest.raises(
        ScheduleError, match="row 1, cell 0 1B0: needs F of stage 1, microbatch 0 before it, and 1F0 is in cell 1\n"
    ):
        verify(by_hand("0F0 0B0", "1B0 1F0", microbatches=1))


@pytest.mark.parametrize(
    ("rows", "rule"),
    [
        (("0F0 0F1 0B0 0B1 0I0 0W0",), "B already holds I and W"),
        (("0F0 0F1 0I0 0I1 0W1",), "0W0 is missing: I and W come together"),
        (("0F0 0F1 0I0 0W0 0W1",), "0I1 is missing: I and W come together"),
        (("0F0 0F1 0W0 0I0 0I1 0W1",), "needs I of stage 0, microbatch 0"),
        (("0F0 0F1 0B0",), "0B1 is missing"),
        (("0F0 0F2 0B0 0B2",), "microbatch 2 must be in 0..1"),
        (("0F0 0F1 1F0",), "stage 1 must be in 0..0"),
        (("0F0",), "0F1 is missing"),
        (("",), "0F0 is missing"),
    ],
)
def test_each_rule_is_named(rows, rule):
    with pytest.raises(ScheduleError) as error:
        verify(by_hand(*rows))
    assert rule in str(error.value)


def test_forward_only_is_complete():
    verify(by_hand("0F0 0F1", "1F0 1F1"))


def test_a_microbatch_may_be_whole_and_another_split():
    verify(by_hand("0F0 0F1 0B0 0I1 0W1", "1F0 1I0 1W0 1F1 1B1"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"devices": 0}, "devices=0 must be at least 1; try 1"),
        ({"repeats": 0}, "repeats=0 must be at least 1; try 1"),
        ({"microbatches": 0}, "microbatches=0 must be at least 1; try 1"),
        ({"placement": "ring"}, "placement='ring' must be 'loop' or 'v'; try 'loop'"),
        ({"devices": 3}, "order has 2 rows but must have one for each of devices=3"),
    ],
)
def test_header_is_checked(change, message):
    schedule = replace(build("1f1b", devices=2, microbatches=2), **change)
    with pytest.raises(ScheduleError) as error:
        verify(schedule)
    assert str(error.value) == message


def test_unknown_phase_is_named():
    order = ((Action(0, "F", 0), Action(0, "X", 0)),)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ScheduleError, match="cell 1 0X0: phase 'X' must be one of F B I W"):
        verify(Schedule("bad", 1, 1, 1, "loop", order))
