"""`auto` is never worse than the catalogue, and better where costs are uneven or memory lies between two families."""

import pytest
from hypothesis import given, settings, strategies as st

from jaxpipe.errors import ScheduleError
from jaxpipe.schedule import CATALOG, Costs, auto, build, simulate, verify
from jaxpipe.schedule.families.craft.greedy import Policy, list_schedule

HEAVY_HEAD = [0.2, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.9]


def best_entry(devices, microbatches, tried, costs, memory, runtime) -> float:
    """The smallest makespan of the catalogue that fits, written down anew."""
    best = float("inf")
    for name in CATALOG:
        for repeats in tried:
            try:
                schedule = build(name, devices=devices, microbatches=microbatches, repeats=repeats)
            except ScheduleError:
                continue
            for timing in (simulate(schedule, costs, runtime), simulate(schedule, costs, runtime, memory="strict")):
                if name != "inference" and max(timing.peak_activations) <= memory:
                    best = min(best, timing.makespan)
    return best


@given(
    st.integers(1, 5),
    st.integers(1, 11),
    st.sampled_from([None, 1, 2]),
    st.tuples(*[st.sampled_from([0.5, 1.0, 2.0])] * 3, st.sampled_from([0.0, 0.2])),
    st.sampled_from([1.0, 1.5, 2.0, 3.0, 5.0, None]),
    st.sampled_from(["async", "lockstep"]),
)
@settings(derandomize=True, max_examples=40, deadline=None)
def test_never_worse_than_the_catalogue_and_within_the_limit(p, m, repeats, times, memory, runtime):
    costs = Costs(*times)
    choice = auto(devices=p, microbatches=m, repeats=repeats, costs=costs, memory=memory, runtime=runtime)
    verify(choice.schedule)
    limit = float("inf") if memory is None else memory
    assert max(choice.timing.peak_activations) <= limit
    assert choice.timing == simulate(choice.schedule, costs, runtime, memory=choice.memory)
    tried = (1, 2) if repeats is None else (repeats,)
    assert choice.timing.makespan <= best_entry(p, m, tried, costs, limit, runtime) * (1 + 1e-9)
    assert "\n" not in choice.reason and choice.reason


def test_returns_the_catalogue_where_no_order_is_faster():
    choice = auto(devices=4, microbatches=8)
    assert choice.schedule.order == build("interleaved_zb", devices=4, microbatches=8, repeats=2).order
    assert choice.reason.startswith("interleaved_zb has the smallest makespan, 25.5, of ")


def test_beats_the_catalogue_with_a_heavy_head_and_a_light_first_stage():
    costs = Costs(HEAVY_HEAD, HEAVY_HEAD, HEAVY_HEAD)
    choice = auto(devices=4, microbatches=16, costs=costs, memory=5)
    assert choice.schedule.name == "auto"
    assert choice.timing.makespan < 0.96 * best_entry(4, 16, (2,), costs, 5, "async")
    assert "less than dualpipe_v (V=2), the best catalogue entry within memory=5" in choice.reason


def test_finds_an_order_where_no_entry_fits():
    choice = auto(devices=4, microbatches=8, memory=3, split=False)
    assert choice.schedule.phases == {"F", "B"}
    assert max(choice.timing.peak_activations) <= 3
    assert "no catalogue entry fits within memory=3" in choice.reason


def test_lockstep_falls_back_to_a_schedules_own_order_where_the_moved_one_keeps_too_much():
    choice = auto(devices=4, microbatches=16, repeats=1, split=False, memory=4, runtime="lockstep")
    assert choice.memory == "strict"
    assert max(choice.timing.peak_activations) <= 4


def test_limits_may_differ_per_device():
    choice = auto(devices=3, microbatches=9, memory=[5, 2, 1])
    assert all(a <= b for a, b in zip(choice.timing.peak_activations, (5, 2, 1), strict=True))


def test_one_activation_everywhere_still_runs():
    choice = auto(devices=4, microbatches=6, memory=1)
    assert max(choice.timing.peak_activations) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 0.5}, "memory=0.5 must be at least 1 on every device: one microbatch; try 1"),
        ({"memory": [4, 4]}, "memory has 2 numbers but must have one per device; try 4"),
        ({"costs": Costs([1.0] * 6)}, "costs have 6 numbers but must have one per stage; try 8"),
        ({"costs": Costs([1.0] * 8), "repeats": 1}, "costs have 8 numbers but must have one per stage; try 4"),
        ({"costs": Costs([1.0] * 8, [1.0] * 4)}, "costs have [4, 8] numbers but must all have one per stage; try 8"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ScheduleError) as error:
        auto(devices=4, microbatches=8, **options)
    assert str(error.value) == message


def test_build_takes_auto_with_costs_and_memory():
    schedule = build("auto", devices=4, microbatches=16, costs=Costs(HEAVY_HEAD), memory=4)
    assert max(simulate(schedule).peak_activations) <= 4


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 3), st.booleans(), st.integers(0, 4), st.booleans())
@settings(derandomize=True, max_examples=60, deadline=None)
def test_list_scheduling_never_blocks_and_keeps_its_cap(p, m, v, split, room, snake):
    from jaxpipe.schedule import Schedule

    empty = Schedule("auto", p, m, v, "v" if snake else "loop", ())
    for forwards in ("late", "groups"):
        schedule = verify(list_schedule(empty, Costs(hop=0.1), [v + room] * p, Policy(split, forwards, 0.5)))
        assert max(simulate(schedule).peak_activations) <= (v + room) / v + 1e-9
