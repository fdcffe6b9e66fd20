"""Rhythms price a schedule exactly as lockstep does, for any number of microbatches, and keep what `lower` allots."""

import pytest

from jaxpipe.plan.rhythm import Cores, Prices, choose, rhythms
from jaxpipe.schedule import Costs, build, lower
from jaxpipe.schedule.catalog import CATALOG
from jaxpipe.schedule.lowering.lockstep import lockstep_makespan
from jaxpipe.schedule.lowering.pack import packings

NAMES = [name for name in CATALOG if name != "inference"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("devices", "microbatches"), [(1, 5), (3, 21), (4, 28), (4, 9)])
def test_makespan_and_slots_are_those_of_lockstep_and_lower(name, devices, microbatches):
    factor, plus = CATALOG[name].least
    if microbatches < factor * devices + plus:
        pytest.skip("the family needs more microbatches")
    repeats = CATALOG[name].repeats or (1 if name in ("gpipe", "1f1b") else 2)
    schedule = build(name, devices=devices, microbatches=microbatches, repeats=repeats)
    stages = range(schedule.stages)
    uneven = Costs([1 + 0.1 * s for s in stages], [1.0] * len(stages), [0.9] * len(stages), 0.2, 0.1, 0.5)
    found = rhythms(name, devices, microbatches, repeats)
    for memory in ("ideal", "strict"):
        mine = [r for r in found if memory == "ideal" or not r.moved]
        for costs in (Costs(recompute=1.0, hop=0.3), uneven):
            prices = Prices.of(costs, schedule)
            ways = packings(schedule, "auto", advance=memory == "ideal")
            least = min(lockstep_makespan(packed, costs) for packed in ways)
            assert min(r.makespan(prices, costs.hop, costs.head) for r in mine) == pytest.approx(least)
        table = lower(schedule, memory=memory)
        chosen = choose(found, Prices.of(Costs(), schedule), "auto", memory)
        assert (chosen.ticks, chosen.slots, chosen.packing) == (table.ticks, table.slots, table.packing)


def test_devices_that_share_cores_take_turns():
    """Four devices on one core do all their work one after the other, and bubbles cost nothing."""
    schedule = build("1f1b", devices=4, microbatches=8)
    (first, *_) = rhythms("1f1b", 4, 8, 1)
    assert first.makespan(Prices.of(Costs(), schedule), cores=Cores(1)) == pytest.approx(4 * 8 * 3)


@pytest.mark.parametrize(
    ("cores", "lanes", "seconds"),
    [
        (Cores(2), [(3.0, 1), (1.0, 1)], 3.0),
        (Cores(2, 2.0), [(3.0, 1), (1.0, 1)], 2.0),  # one second beside each other, then two seconds' work in one
        (Cores(2, 1.5), [(0.0, 1), (3.0, 1)], 2.0),
        (Cores(2, 2.0), [(1.0, 4)], 2.0),
        (Cores(2), [(1.0, 2), (3.0, 1)], 3.5),  # three share two cores until the short ones have ended
        (Cores(4, 3.0), [(1.0, 2)], 2 / (2 + 2 * 2 / 3)),
        (Cores(0.5, 2.0), [(1.0, 1)], 2.0),
    ],
)
def test_a_device_that_waits_leaves_its_core_to_the_others(cores, lanes, seconds):
    assert cores.time(lanes) == pytest.approx(seconds)
    busy, longest = sum(s * n for s, n in lanes), max(s for s, _ in lanes)
    assert cores.time(lanes) >= max(busy / cores.number, longest / cores.alone) * (1 - 1e-9)
