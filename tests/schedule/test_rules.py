"""The dependency rule."""

from collections import Counter

import pytest

from jaxpipe.schedule import CATALOG, Action, Schedule, build
from jaxpipe.schedule.rules import Deadlock, Value, reads, run_order, writes


def test_first_stage_reads_no_input_and_last_stage_no_gradient():
    assert reads(Action(0, "F", 3), stages=2) == ()
    assert reads(Action(1, "F", 3), stages=2) == (Value("x", 1, 3),)
    assert reads(Action(1, "B", 3), stages=2) == (Value("r", 1, 3),)
    assert reads(Action(0, "I", 3), stages=2) == (Value("r", 0, 3), Value("g", 0, 3))
    assert reads(Action(0, "W", 3), stages=2) == (Value("w", 0, 3),)


@pytest.mark.parametrize("name", CATALOG)
def test_every_value_is_written_once_and_read(name):
    schedule = build(name, devices=3, microbatches=7)
    actions = [a for row in schedule.order for a in row]
    written = Counter(v for a in actions for v in writes(a, schedule.stages))
    read = Counter(v for a in actions for v in reads(a, schedule.stages))
    assert set(written.values()) == set(read.values()) == {1}
    unread = set() if name != "inference" else {v for v in written if v.kind == "r"}
    assert set(read) == set(written) - unread


@pytest.mark.parametrize("name", CATALOG)
def test_run_order_writes_before_it_reads(name):
    schedule = build(name, devices=4, microbatches=8)
    seen: set[Value] = set()
    count = 0
    for device, action in run_order(schedule):
        assert schedule.device_of(action.stage) == device
        assert seen.issuperset(reads(action, schedule.stages))
        seen.update(writes(action, schedule.stages))
        count += 1
    assert count == sum(map(len, schedule.order))


def test_run_order_says_how_far_each_device_came():
    rows = (("0F0", "0B0", "0F1", "0B1"), ("1F1", "1B1", "1F0", "1B0"))
    order = tuple(tuple(map(Action.parse, row)) for row in rows)
    with pytest.raises(Deadlock) as stop:
        list(run_order(Schedule("bad", 2, 2, 1, "loop", order)))
    assert stop.value.done == [1, 0]
