"""Slots: colouring is tight, and there are as many as values that live at once."""

from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from jaxpipe.errors import ScheduleError
from jaxpipe.schedule import CATALOG, TickTable, build
from jaxpipe.schedule.lowering.lower import lower, tabulate
from jaxpipe.schedule.lowering.pack import order_peak, pack, packings
from jaxpipe.schedule.lowering.replay import check
from jaxpipe.schedule.lowering.slots import KINDS, action_ticks, colour, lifetimes

INTERVALS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 8)), max_size=25).map(
    lambda pairs: [(start, start + length, (n, 0)) for n, (start, length) in enumerate(pairs)]
)


@given(INTERVALS)
def test_no_two_live_values_share_a_slot_and_none_is_wasted(intervals):
    slot, used = colour(intervals)
    alive = [[v for start, end, v in intervals if start <= tick <= end] for tick in range(30)]
    assert all(len({slot[v] for v in values}) == len(values) for values in alive)
    assert used == max(map(len, alive))


@pytest.mark.parametrize("name", CATALOG)
def test_slots_are_the_most_alive_at_once(name):
    for packed in packings(build(name, devices=4, microbatches=9), "auto"):
        table, ticks = tabulate(packed), action_ticks(packed)
        lives = [lifetimes(packed, ticks, device) for device in range(4)]
        for kind in KINDS:
            most = max(
                sum(start <= tick <= end for start, end, _ in live[kind])
                for live in lives
                for tick in range(packed.ticks)
            )
            assert getattr(table.slots, kind) == (0 if kind == "gradient" and table.gradient_direct else most)


@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize("microbatches", [4, 8, 9, 13])
def test_paired_circular_slots_equal_the_peak(microbatches, repeats):
    schedule = build("interleaved_1f1b", devices=4, microbatches=microbatches, repeats=repeats)
    table = lower(schedule, "paired")
    assert table.slots.activation == table.slots.residual == max(order_peak(schedule))
    # Groups larger than P wait at the wrap: then arrivals need a slot before they are used.
    direct = microbatches % 4 == 0 or repeats == 1
    assert (table.slots.gradient == 0) == table.gradient_direct == table.forward_direct == direct


@pytest.mark.parametrize("name", ["zb_v", "v_half"])
@pytest.mark.parametrize("devices", [2, 3, 4, 6, 8])
def test_single_snakes_need_up_to_two_slots_for_early_arrivals(name, devices):
    packed = pack(build(name, devices=devices, microbatches=3 * devices), "single")
    table = tabulate(packed)
    assert table.slots.residual == max(packed.peak_stages())
    assert 0 <= table.slots.activation - max(packed.peak_stages()) <= 2


@pytest.mark.parametrize("name", [n for n in CATALOG if n not in ("gpipe", "circular", "breadth_first")])
def test_slots_do_not_grow_with_the_microbatches(name):
    few, many = (lower(build(name, devices=4, microbatches=m), "single").slots for m in (16, 40))
    assert few == many


def most_live_residuals(table: TickTable) -> int:
    """Counted tick by tick from the actions alone: forwards of stages that keep, minus what frees them."""
    most = 0
    for device in range(table.schedule.devices):
        live = 0
        for tick in range(table.ticks):
            kept = [a for a in table.actions(tick, device) if table.keeps[a.stage]]
            live += sum(a.phase == "F" for a in kept)
            most = max(most, live)
            live -= sum(a.phase in "BW" for a in kept)
    return most


FAMILIES = [n for n in CATALOG if n != "inference"]


@given(st.sampled_from(FAMILIES), st.integers(1, 4), st.integers(0, 5), st.data())
@settings(max_examples=60, deadline=None)
def test_only_stages_that_keep_have_residual_slots(name, devices, extra, data):
    family = CATALOG[name]
    schedule = build(name, devices=devices, microbatches=family.least[0] * devices + family.least[1] + extra)
    keeps = data.draw(st.lists(st.booleans(), min_size=schedule.stages, max_size=schedule.stages))
    table, whole = check(lower(schedule, keeps=keeps)), lower(schedule)
    assert table.keeps == tuple(keeps) and whole.keeps == (True,) * schedule.stages
    assert table.slots.residual == most_live_residuals(table) <= whole.slots.residual
    assert whole.slots.residual == most_live_residuals(whole)
    others = [c for c in table.columns if not c.endswith("_residual") or c.endswith("weight_residual")]
    assert all(table.columns[c] == whole.columns[c] for c in others)
    for lane in "fbw":
        for tick, row in enumerate(table.columns[f"{lane}_residual"]):
            for device, slot in enumerate(row):
                repeat = table.columns[f"{lane}_repeat"][tick][device]
                assert (slot >= 0) == (repeat >= 0 and keeps[schedule.stage_at(device, repeat)])


@pytest.mark.parametrize("memory", ["ideal", "strict"])
def test_1f1b_with_early_stages_rematerialised_keeps_what_the_later_ones_keep(memory):
    """Early devices hold most microbatches, so the first residual that is kept decides."""
    schedule, counts = build("1f1b", devices=8, microbatches=32), []
    for first in range(9):
        table = check(lower(schedule, memory=memory, keeps=[s >= first for s in range(8)]))
        assert table.slots.residual == most_live_residuals(table)
        if memory == "strict":
            assert table.slots.residual == max(order_peak(schedule)[first:], default=0)
        counts.append(table.slots.residual)
    assert counts == sorted(counts, reverse=True) and counts[8] == 0
    assert counts[4] <= counts[0] / 2 + 1


def test_keeps_must_have_a_flag_per_stage():
    with pytest.raises(ScheduleError, match="keeps has 3 flags but must have one per stage; try 8"):
        lower(build("zb_v", devices=4, microbatches=8), keeps=[True] * 3)


@pytest.mark.parametrize("column", ["f_residual", "b_residual", "w_residual"])
def test_replay_rejects_a_residual_of_a_stage_that_keeps_none(column):
    table = lower(build("zb_h1", devices=2, microbatches=4))
    with pytest.raises(ScheduleError, match="_residual is set though stage 0 keeps no residuals"):
        check(replace(table, keeps=(False, True)))
    bare = lower(build("zb_h1", devices=2, microbatches=4), keeps=[False, True])
    with pytest.raises(ScheduleError, match=f"{column} is set though stage 0 keeps no residuals"):
        check(replace(bare, columns=bare.columns | {column: table.columns[column]}))
