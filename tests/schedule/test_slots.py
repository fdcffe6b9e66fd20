"""Slots: colouring is tight, and there are as many as values that live at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpipe.schedule import CATALOG, build
from jaxpipe.schedule.lower import lower, tabulate
from jaxpipe.schedule.pack import order_peak, pack, packings
from jaxpipe.schedule.slots import KINDS, action_ticks, colour, lifetimes

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
