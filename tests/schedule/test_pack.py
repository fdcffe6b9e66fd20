"""Ticks: the circular formulas by brute force, what may share a tick, and lockstep times against known numbers."""

import itertools

import pytest

from jaxpipe.schedule import CATALOG, Costs, build, verify
from jaxpipe.schedule.ir import Action, Schedule
from jaxpipe.schedule.lowering.lockstep import lockstep_local_makespan, lockstep_makespan
from jaxpipe.schedule.lowering.lower import choose
from jaxpipe.schedule.lowering.pack import LANE, Packed, order_peak, pack, packings

UNIT, UNEVEN, SLOW_INPUT = Costs(1, 1, 1), Costs(1, 1.1, 0.9), Costs(1, 2.1, 0.9)


def index_of(devices: int, microbatches: int, repeats: int) -> tuple[dict[tuple[int, int], int], int]:
    """idx(m, c) and the largest group, written from the formula and not from the library."""
    if microbatches % devices == 0:
        group = devices
        index = {
            (m, c): (m // devices) * devices * repeats + c * devices + m % devices
            for m in range(microbatches)
            for c in range(repeats)
        }
        return index, group
    count = max(1, microbatches // devices)
    sizes = [microbatches // count + (g < microbatches % count) for g in range(count)]
    index, start, first = {}, 0, 0
    for size in sizes:
        width = max(size, devices)
        index |= {(first + j, c): start + c * width + j for c in range(repeats) for j in range(size)}
        start, first = start + width * repeats, first + size
    return index, max(*sizes, devices)


@pytest.mark.parametrize("devices", range(1, 9))
def test_circular_actions_run_in_the_ticks_of_the_formula(devices):
    for m, v in itertools.product(range(1, 18), range(1, 5)):
        packed = pack(build("interleaved_1f1b", devices=devices, microbatches=m, repeats=v), "paired")
        index, largest = index_of(devices, m, v)
        for action, tick in packed.tick.items():
            i, c = packed.schedule.device_of(action.stage), packed.schedule.repeat_of(action.stage)
            if action.phase == "F":
                assert tick == i + index[action.microbatch, c]
            else:
                first = (v - 1) * largest + devices - 1 + (devices - 1 - i)
                assert tick == first + index[action.microbatch, v - 1 - c]
        peaks = [min((v - 1) * largest + 2 * devices - 1 - 2 * i, m * v) for i in range(devices)]
        assert packed.peak_stages() == peaks if m >= devices else packed.peak_stages() <= peaks
        if m % devices == 0:
            assert peaks == [min(v * devices + devices - 1 - 2 * i, m * v) for i in range(devices)]
            for f, i, w in ((1, 1, 1), (1, 0.25, 0.5), (3, 1, 0.5)):
                ideal = (m * v + devices - 1) * (f + i + w) / v
                assert lockstep_makespan(packed, Costs(f, i, w)) == pytest.approx(ideal)


def test_circular_phases_have_the_lengths_of_the_formula():
    p, m, v = 4, 8, 2
    packed = pack(build("interleaved_1f1b", devices=p, microbatches=m, repeats=v), "paired")
    lanes = [{LANE[a.phase] for a, t in packed.tick.items() if t == tick} for tick in range(packed.ticks)]
    assert [lanes.count({0}), lanes.count({0, 1}), lanes.count({1})] == [v * p - 1, m * v + p - v * p, v * p - 1]


def test_1f1b_in_paired_ticks_is_eager_1f1b():
    plain = pack(build("1f1b", devices=4, microbatches=9), "paired", advance=True)
    eager = pack(build("eager_1f1b", devices=4, microbatches=9), "paired")
    assert plain.advanced and plain.tick == eager.tick


def test_single_1f1b_time_is_its_closed_form():
    packed = pack(build("1f1b", devices=8, microbatches=32), "single")
    for f, b in ((1, 2), (2, 3)):
        assert lockstep_makespan(packed, Costs(f, b / 2, b / 2)) == 8 * f + (2 * 32 + 8 - 2) * b


def of(name: str, sharing: str, advanced: bool = False) -> Packed:
    """One packing of a schedule of 8 devices and 32 microbatches."""
    schedule = build(name, devices=8, microbatches=32, repeats=2 if name == "interleaved_1f1b" else None)
    found = [p for p in packings(schedule, "auto") if p.sharing == sharing and p.advanced == advanced]
    return found[0]


def beyond_work(makespan: float, costs: Costs) -> float:
    times = costs.forward, costs.backward_input, costs.backward_weight
    assert all(isinstance(time, int | float) for time in times)
    return makespan - 32 * sum(times)  # pyright: ignore[reportArgumentType, reportCallIssue]


@pytest.mark.parametrize(
    ("name", "costs", "sharing", "everyone", "by_lane"),
    [
        ("zb_h1", UNIT, "none", 7, None),
        ("zb_h1", UNIT, "all", 95, 53),
        ("zb_h1", UNIT, "weights_alone", 45, 14),
        ("zb_h1", UNEVEN, "none", 16.3, None),
        ("zb_h1", UNEVEN, "all", 95.7, None),
        ("zb_h1", UNEVEN, "weights_alone", 51.9, 15.5),
        ("zb_v", UNIT, "none", 3.5, None),
        ("zb_v", UNIT, "all", 24.5, None),
        ("zb_v", UNIT, "weights_alone", 34.5, 7),
        ("zb_v", UNEVEN, "none", 11.85, None),
        ("zb_v", UNEVEN, "all", 24.15, None),
        ("zb_v", UNEVEN, "weights_alone", 40.45, 7.45),
        ("dualpipe_v", UNIT, "none", 7, None),
        ("dualpipe_v", UNIT, "all", 22, None),
        ("dualpipe_v", UNIT, "weights_alone", 11, 6.5),
        ("interleaved_1f1b", UNIT, "none", 38, None),
        ("interleaved_1f1b", UNIT, "all", 10.5, None),
    ],
)
def test_time_beyond_the_work_of_each_sharing(name, costs, sharing, everyone, by_lane):
    packed = of(name, sharing)
    assert beyond_work(lockstep_makespan(packed, costs), costs) == pytest.approx(everyone)
    if by_lane is not None:
        assert beyond_work(lockstep_local_makespan(packed, costs), costs) == pytest.approx(by_lane)


def split_backwards(row: tuple[Action, ...]) -> tuple[Action, ...]:
    """Each B as an I with its W behind."""
    split = {"F": "F", "B": "IW"}
    return tuple(Action(a.stage, phase, a.microbatch) for a in row for phase in split[a.phase])  # pyright: ignore


@pytest.mark.parametrize("costs", [UNIT, UNEVEN, SLOW_INPUT])
@pytest.mark.parametrize("microbatches", [3, 8, 20])
def test_held_weights_keep_the_bubble_whatever_the_ratio(costs, microbatches):
    p, m = 8, microbatches
    rows = build("1f1b", devices=p, microbatches=m).order
    schedule = verify(Schedule("split", p, m, 1, "loop", tuple(split_backwards(row) for row in rows)))
    packed = pack(schedule, "paired", advance=True, sharing="weights_held")
    f, i, w = costs.forward, costs.backward_input, costs.backward_weight
    assert lockstep_makespan(packed, costs) == pytest.approx(m * (f + i + w) + (p - 1) * (f + i))
    assert all(kept <= 2 * p - 1 - d for d, kept in enumerate(packed.peak_stages()))


@pytest.mark.parametrize(
    ("name", "repeats", "costs", "packing", "bubble"),
    [
        ("interleaved_1f1b", 1, UNEVEN, "paired", 0.179),
        ("interleaved_1f1b", 2, UNEVEN, "paired", 0.099),
        ("interleaved_1f1b", 4, SLOW_INPUT, "paired", 0.052),
        ("1f1b", 1, UNIT, "single", 0.351),
        ("zb_h1", 1, UNIT, "single", 0.068),
        ("zb_h1", 1, UNEVEN, "single", 0.145),
        ("zb_h1", 1, SLOW_INPUT, "single", 0.380),
    ],
)
def test_lockstep_bubble_of_8_devices_and_32_microbatches(name, repeats, costs, packing, bubble):
    packed = pack(build(name, devices=8, microbatches=32, repeats=repeats), packing)
    time = lockstep_makespan(packed, costs)
    assert 1 - (time - beyond_work(time, costs)) / time == pytest.approx(bubble, abs=5e-4)


@pytest.mark.parametrize("name", CATALOG)
@pytest.mark.parametrize("costs", [UNIT, UNEVEN, SLOW_INPUT, Costs(1, 1, 1, hop=0.3), Costs(1, 1.1, 0.9, head=0.4)])
def test_auto_is_never_worse_and_lanes_on_their_own_never_slower(name, costs):
    schedule = build(name, devices=4, microbatches=9)
    auto = lockstep_makespan(choose(schedule, "auto", costs, "ideal"), costs)
    for packing in ("single", "paired"):
        assert auto <= lockstep_makespan(choose(schedule, packing, costs, "ideal"), costs) + 1e-9
    for packed in packings(schedule, "auto"):
        assert auto <= lockstep_makespan(packed, costs) + 1e-9
        local = lockstep_local_makespan(packed, costs)
        if not costs.hop:
            assert local <= lockstep_makespan(packed, costs) + 1e-9
        assert lockstep_local_makespan(packed, costs, waits_for="neighbours") <= local + 1e-9


@pytest.mark.parametrize("name", CATALOG)
def test_strict_keeps_no_more_than_the_order(name):
    schedule = build(name, devices=4, microbatches=9)
    packed = choose(schedule, "auto", UNIT, "strict")
    assert all(a <= b for a, b in zip(packed.peak_stages(), order_peak(schedule), strict=True))


def test_a_hop_that_no_lane_hides_is_paid():
    schedule = Schedule(
        "forwards", 2, 2, 1, "loop", tuple(row[:2] for row in build("gpipe", devices=2, microbatches=2).order)
    )
    packed = pack(schedule, "single")
    # ticks: 0F0 | 0F1 1F0 | 1F1, and the hops after the first two
    assert lockstep_makespan(packed, Costs(1, 1, 1, hop=0.25)) == 3 + 2 * 0.25
    assert lockstep_local_makespan(packed, Costs(1, 1, 1, hop=0.25)) == 3 + 2 * 0.25


@pytest.mark.parametrize("name", CATALOG)
@pytest.mark.parametrize("hop", [0.0, 0.3])
def test_no_packing_gets_faster_with_a_dearer_head(name, hop):
    for packed in packings(build(name, devices=4, microbatches=9), "auto"):
        for price in (lockstep_makespan, lockstep_local_makespan):
            times = [price(packed, Costs(1, 1.3, 0.6, hop=hop, head=head)) for head in (0.0, 0.01, 0.5, 2.0)]
            assert times == sorted(times) and times[3] - times[2] == pytest.approx(9 * 1.5)


def test_auto_takes_the_meetings_at_the_head_into_account():
    """One action per tick is best for zb_h1, but not where all devices meet in the middle of every forward's tick."""
    schedule = build("zb_h1", devices=8, microbatches=32)
    assert choose(schedule, "auto", UNIT, "ideal").packing == "single"
    assert choose(schedule, "auto", Costs(head=0.25), "ideal").packing == "paired"
