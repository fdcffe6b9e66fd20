"""Actions, and where stages live."""

import pytest
from hypothesis import given, settings, strategies as st

from jaxpipe.errors import ScheduleError
from jaxpipe.schedule import Action, Schedule


def empty(devices: int, repeats: int, placement) -> Schedule:
    return Schedule("none", devices, 1, repeats, placement, ())


@given(st.builds(Action, st.integers(0, 999), st.sampled_from("FBIW"), st.integers(0, 9999)))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_action_text_round_trips(action):
    assert Action.parse(str(action)) == action
    assert Action.parse(f"  {action} ") == action


@pytest.mark.parametrize(
    "text", ["", "F0", "0F", "0X0", "-1F0", "0F-1", "00F0", "0F01", "0F0xyz", "0 F 0", "1.0F0", "0f0"]
)
def test_action_refuses_other_text(text):
    with pytest.raises(ScheduleError, match="must read STAGE"):
        Action.parse(text)


def test_loop_places_stages_round_the_ring():
    schedule = empty(3, 2, "loop")
    assert [schedule.device_of(s) for s in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [schedule.direction(s, s + 1) for s in range(5)] == [1, 1, 1, 1, 1]


def test_v_places_stages_as_a_snake():
    schedule = empty(3, 2, "v")
    assert [schedule.device_of(s) for s in range(6)] == [0, 1, 2, 2, 1, 0]
    assert [schedule.direction(s, s + 1) for s in range(5)] == [1, 1, 0, -1, -1]
    assert [schedule.direction(s + 1, s) for s in range(5)] == [-1, -1, 0, 1, 1]


@pytest.mark.parametrize("placement", ["loop", "v"])
@pytest.mark.parametrize(("devices", "repeats"), [(1, 1), (1, 3), (2, 4), (5, 2)])
def test_stage_at_inverts_device_of_and_repeat_of(placement, devices, repeats):
    schedule = empty(devices, repeats, placement)
    for stage in range(schedule.stages):
        assert schedule.stage_at(schedule.device_of(stage), schedule.repeat_of(stage)) == stage


def test_one_device_never_hops():
    assert empty(1, 3, "loop").direction(0, 1) == 0
