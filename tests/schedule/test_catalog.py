"""`build`: every name offered works, and what it refuses it explains in one line."""

import subprocess
import sys

import pytest

from jaxpipe.errors import ScheduleError
from jaxpipe.schedule import CATALOG, Costs, build, verify

NAMES = ["gpipe", "circular", "breadth_first", "1f1b", "eager_1f1b", "interleaved_1f1b", "zb_h1", "zb_h2"]
NAMES += ["interleaved_zb", "zb_v", "v_half", "v_min", "dualpipe_v", "inference"]


def test_all_names_are_there():
    assert list(CATALOG) == NAMES


@pytest.mark.parametrize("name", [*NAMES, "auto"])
def test_every_name_builds_with_its_own_repeats(name):
    schedule = verify(build(name, devices=4, microbatches=8))
    if name != "auto":
        assert schedule.name == name
        assert schedule.repeats == (2 if schedule.placement == "v" else 1)


@pytest.mark.parametrize("name", NAMES)
def test_the_least_number_of_microbatches_builds_and_one_less_is_refused(name):
    factor, plus = CATALOG[name].least
    for devices in (1, 2, 5):
        least = factor * devices + plus
        verify(build(name, devices=devices, microbatches=least))
        with pytest.raises(ScheduleError, match=f"try {least}$"):
            build(name, devices=devices, microbatches=least - 1)


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        ("dualpipe_v", (4, 6, None), "microbatches=6 must be at least 2*devices=8 for dualpipe_v; try 8"),
        ("zb_v", (4, 6, None), "microbatches=6 must be at least 2*devices-1=7 for zb_v; try 7"),
        ("zb_h1", (4, 3, None), "microbatches=3 must be at least devices=4 for zb_h1; try 4"),
        ("1f1b", (0, 3, None), "devices=0 must be a whole number of at least 1; try 1"),
        ("1f1b", (4, 2.5, None), "microbatches=2.5 must be a whole number of at least 1; try 1"),
        ("1f1b", (True, 2, None), "devices=True must be a whole number of at least 1; try 1"),
        ("interleaved_1f1b", (4, 8, 0), "repeats=0 must be a whole number of at least 1; try 1"),
        ("zb_v", (4, 8, 1), "repeats=1 must be 2 for zb_v; try 2"),
        ("1f1b", (4, 8, 2), "repeats=2 must be 1 for 1f1b; try 1 or interleaved_1f1b for other repeats"),
    ],
)
def test_illegal_numbers_say_rule_value_and_nearest(name, numbers, message):
    devices, microbatches, repeats = numbers
    with pytest.raises(ScheduleError) as error:
        build(name, devices=devices, microbatches=microbatches, repeats=repeats)
    assert str(error.value) == message


@pytest.mark.parametrize(("wrong", "nearest"), [("1f1", "1f1b"), ("zbv", "zb_v"), ("Gpipe", "gpipe"), ("aut", "auto")])
def test_an_unknown_name_gets_the_nearest(wrong, nearest):
    with pytest.raises(ScheduleError, match=f"try '{nearest}'$"):
        build(wrong, devices=2, microbatches=2)


@pytest.mark.parametrize(
    ("name", "microbatches", "size", "message"),
    [
        ("interleaved_1f1b", 8, 3, "group_size=3 must be between devices=4 and microbatches=8; try 4"),
        ("interleaved_1f1b", 8, 9, "group_size=9 must be between devices=4 and microbatches=8; try 8"),
        ("interleaved_1f1b", 3, 4, "group_size=4 must be between devices=4 and microbatches=3; leave it out"),
        ("interleaved_1f1b", 8, 0, "group_size=0 must be a whole number of at least 1; try 1"),
        ("1f1b", 8, 4, "group_size=4 has no effect for 1f1b; try 'interleaved_1f1b'"),
        ("auto", 8, 4, "group_size=4 has no effect for auto; try 'interleaved_1f1b'"),
    ],
)
def test_group_size_is_checked(name, microbatches, size, message):
    with pytest.raises(ScheduleError) as error:
        build(name, devices=4, microbatches=microbatches, group_size=size)
    assert str(error.value) == message


def test_options_without_effect_are_refused():
    with pytest.raises(ScheduleError, match="costs has no effect for 1f1b"):
        build("1f1b", devices=2, microbatches=2, costs=Costs())
    with pytest.raises(ScheduleError, match="memory has no effect for 1f1b"):
        build("1f1b", devices=2, microbatches=2, memory=3)


@pytest.mark.parametrize("forward", [-1, [1, -1], float("nan")])
def test_costs_below_zero_are_refused(forward):
    with pytest.raises(ScheduleError, match=r"^forward=.* must not be negative; try 0$"):
        Costs(forward)


def test_importing_schedules_loads_neither_jax_nor_numpy():
    code = "import sys, jaxpipe.schedule; sys.exit(any(m in sys.modules for m in ('jax', 'numpy')))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_schedule_that_fits_no_memory_is_refused_before_it_is_built():
    for name in ("gpipe", "auto"):
        with pytest.raises(ScheduleError, match=r"=2\*1000000000\*1=2000000000 must be at most 16777216; try microb"):
            build(name, devices=2, microbatches=10**9)
