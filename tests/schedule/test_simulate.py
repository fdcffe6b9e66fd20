"""Simulated times against hand-made cases, published tables and each other."""

import time

import pytest
from hypothesis import given, settings, strategies as st

from jaxpipe.errors import ScheduleError
from jaxpipe.schedule import Action, Costs, Schedule, build, simulate
from jaxpipe.schedule.lowering.lockstep import lockstep_local_makespan, lockstep_makespan
from jaxpipe.schedule.lowering.lower import choose
from jaxpipe.schedule.simulate import Runtime


def by_hand(*rows: str, microbatches: int = 1) -> Schedule:
    order = tuple(tuple(map(Action.parse, row.split())) for row in rows)
    return Schedule("by hand", len(rows), microbatches, 1, "loop", order)


CHAIN = by_hand("0F0 0I0 0W0", "1F0 1I0 1W0")


def test_intervals_idle_and_critical_path_of_a_chain():
    timing = simulate(CHAIN, Costs(2.0, 3.0, 1.0, hop=0.5))
    assert [(start, end, str(action)) for start, end, action in timing.busy[0]] == [
        (0.0, 2.0, "0F0"),
        (8.0, 11.0, "0I0"),
        (11.0, 12.0, "0W0"),
    ]
    assert timing.idle == (((2.0, 8.0),), ((0.0, 2.5), (8.5, 12.0)))
    assert timing.makespan == 12.0
    assert timing.bubble == pytest.approx(1 - 12 / 24)
    assert timing.span_bubble == pytest.approx(1 - 12 / 24)
    assert timing.bubble_time == pytest.approx(6.0)
    assert [str(action) for action in timing.critical_path] == ["0F0", "1F0", "1I0", "0I0", "0W0"]


def test_span_bubble_takes_the_longest_span_of_one_device():
    timing = simulate(by_hand("0F0", "1F0"), Costs(forward=1.0, hop=3.0))
    assert timing.makespan == 5.0
    assert timing.span_bubble == 0.0


def test_a_hop_does_not_occupy_its_sender_unless_asked():
    schedule = by_hand("0F0 0F1", "1F0 1F1", microbatches=2)
    costs = Costs(forward=1.0, hop=0.5)
    assert simulate(schedule, costs).makespan == 3.5
    assert simulate(schedule, costs, blocking_hops=True).makespan == 4.0


def test_recompute_is_charged_to_the_backward():
    plain = simulate(build("1f1b", devices=2, microbatches=4))
    again = simulate(build("1f1b", devices=2, microbatches=4), Costs(recompute=1.0))
    assert again.makespan == pytest.approx(plain.makespan * 4 / 3)


def test_costs_may_differ_per_stage():
    timing = simulate(build("gpipe", devices=3, microbatches=4), Costs([1.0, 1.0, 2.0], [1.0, 1.0, 2.0], 0.0))
    assert timing.makespan == 2 + 4 * (2 + 2) + 2
    with pytest.raises(ScheduleError, match="forward has 2 numbers but must have one per stage; try 3"):
        simulate(build("gpipe", devices=3, microbatches=4), Costs([1.0, 2.0]))


def test_activations_after_the_input_gradient_may_count_for_less():
    schedule = build("zb_h2", devices=4, microbatches=12)
    whole, half, none = (simulate(schedule, after_input=share).peak_activations for share in (1.0, 0.5, 0.0))
    assert whole == (7, 7, 7, 7)
    assert none == (7, 5, 3, 1)
    assert all(a <= b <= c for a, b, c in zip(none, half, whole, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "lock"}, "runtime='lock' must be 'async', 'lockstep' or 'lockstep_local'; try 'async'"),
        ({"packing": "greedy"}, "packing='greedy' must be 'auto', 'paired' or 'single'; try 'auto'"),
        ({"memory": "tight"}, "memory='tight' must be 'ideal' or 'strict'; try 'ideal'"),
        ({"after_input": 2}, "after_input=2 must be between 0 and 1; try 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ScheduleError) as error:
        simulate(CHAIN, **options)
    assert str(error.value) == message


def test_costs_of_zero_have_no_bubble():
    timing = simulate(CHAIN, Costs(0.0, 0.0, 0.0))
    assert (timing.makespan, timing.bubble, timing.span_bubble) == (0.0, 0.0, 0.0)


def test_a_deadlock_is_an_error():
    with pytest.raises(ScheduleError, match="wait for each other in a circle"):
        simulate(by_hand("0F0 0B0 0F1 0B1", "1F1 1B1 1F0 1B0", microbatches=2))


# Qi et al. 2024 (ICLR), zero bubble pipeline parallelism, table 5: bubble rates of the longest span, times in ms.
PUBLISHED = [
    (8, 24, (18.522, 18.086, 9.337, 0.601), (0.2431, 0.1585, 0.1083)),
    (8, 64, (29.935, 29.621, 19.388, 0.535), (0.1091, 0.0554, 0.0294)),
    (32, 96, (10.419, 10.207, 7.715, 0.408), (0.2646, 0.1421, 0.0641)),
]


@pytest.mark.parametrize(("p", "m", "times", "rates"), PUBLISHED)
def test_published_bubble_rates(p, m, times, rates):
    for name, rate in zip(("1f1b", "zb_h1", "zb_h2"), rates, strict=True):
        timing = simulate(build(name, devices=p, microbatches=m), Costs(*times))
        assert timing.span_bubble == pytest.approx(rate, abs=5e-5), name


@pytest.mark.parametrize("times", [(1, 1, 1), (1, 1.1, 0.9), (1, 2.1, 0.9), (3, 1, 1)])
@pytest.mark.parametrize(("v", "bubble"), [(1, 0.179), (2, 0.099), (4, 0.052)])
def test_paired_lockstep_bubble_does_not_depend_on_the_ratio(times, v, bubble):
    schedule = build("interleaved_1f1b", devices=8, microbatches=32, repeats=v)
    assert simulate(schedule, Costs(*times), "lockstep").bubble == pytest.approx(bubble, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "times", "bubble"),
    [
        ("1f1b", (1, 1, 1), 0.351),
        ("zb_h1", (1, 1, 1), 0.068),
        ("zb_h1", (1, 1.1, 0.9), 0.145),
        ("zb_h1", (1, 2.1, 0.9), 0.380),
    ],
)
def test_single_lockstep_bubbles(name, times, bubble):
    timing = simulate(build(name, devices=8, microbatches=32), Costs(*times), "lockstep", packing="single")
    assert timing.bubble == pytest.approx(bubble, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "v", "times", "asynchronous", "single"),
    [
        ("zb_h1", 1, (1, 1, 1), 7, 7),
        ("zb_h1", 1, (1, 1.1, 0.9), 8.4, 16.3),
        ("zb_v", 2, (1, 1, 1), 3.5, 3.5),
        ("zb_v", 2, (1, 1.1, 0.9), 3.85, 11.85),
        ("dualpipe_v", 2, (1, 1, 1), 3.5, 7),
        ("interleaved_1f1b", 2, (1, 1, 1), 10.5, 38),
    ],
)
def test_idle_time_beyond_the_work(name, v, times, asynchronous, single):
    schedule, costs = build(name, devices=8, microbatches=32, repeats=v), Costs(*times)
    work = 32 * sum(times)
    assert simulate(schedule, costs).makespan - work == pytest.approx(asynchronous, abs=5e-4)
    assert simulate(schedule, costs, "lockstep", packing="single").makespan - work == pytest.approx(single, abs=5e-4)


@pytest.mark.parametrize(
    "name",
    ["gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v", "v_half", "dualpipe_v", "interleaved_zb", "inference"],
)
@pytest.mark.parametrize(("hop", "head"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.7), (0.3, 0.7)])
def test_lockstep_times_are_those_that_packing_is_priced_by(name, hop, head):
    schedule, costs = build(name, devices=4, microbatches=9), Costs(1.0, 1.3, 0.6, hop=hop, head=head)
    for packing in ("single", "paired"):
        for memory in ("ideal", "strict"):
            packed = choose(schedule, packing, costs, memory)
            runtimes: tuple[Runtime, ...] = ("lockstep", "lockstep_local")
            for runtime, price in zip(runtimes, (lockstep_makespan, lockstep_local_makespan), strict=True):
                timing = simulate(schedule, costs, runtime, packing=packing, memory=memory)
                assert timing.makespan == pytest.approx(price(packed, costs))
                assert timing.peak_activations == tuple(n / schedule.repeats for n in packed.peak_stages())


@given(
    st.sampled_from(["1f1b", "interleaved_1f1b", "zb_h1", "zb_v", "dualpipe_v", "v_half"]),
    st.integers(1, 5),
    st.integers(0, 6),
    st.tuples(*[st.sampled_from([0.5, 1.0, 1.5])] * 3),
    st.sampled_from([0.0, 0.25]),
    st.sampled_from([0.0, 0.75]),
)
@settings(derandomize=True, max_examples=90, deadline=None)
def test_timings_are_consistent(name, p, more, times, hop, head):
    schedule, costs = build(name, devices=p, microbatches=2 * p + more), Costs(*times, hop=hop, head=head)
    loose = simulate(schedule, costs, packing="single")
    for runtime in ("async", "lockstep", "lockstep_local"):
        timing = simulate(schedule, costs, runtime, packing="single")
        assert timing.makespan >= loose.makespan - 1e-9
        busy, idle = [[b - a for a, b, *_ in row] for row in timing.busy], [[b - a for a, b in r] for r in timing.idle]
        for worked, waited in zip(busy, idle, strict=True):
            met = sum(end - start for start, end in timing.heads)
            assert sum(worked) + sum(waited) + met == pytest.approx(timing.makespan)
        assert timing.bubble_time * p == pytest.approx(sum(sum(waited) for waited in idle))
        ends = [row[-1].end for row in timing.busy]
        assert any(
            timing.critical_path[-1] == row[-1].action
            for row, end in zip(timing.busy, ends, strict=True)
            if end == max(ends)
        )
        at = {action: (start, end) for row in timing.busy for start, end, action in row}
        assert at[timing.critical_path[0]][0] == 0.0
        for before, after in zip(timing.critical_path, timing.critical_path[1:], strict=False):
            # Under a global tick one action can wait for several hops in a row, and for heads.
            assert -1e-9 <= at[after][0] - at[before][1] <= (hop if runtime == "async" else 4 * (hop + head)) + 1e-9


def test_a_large_lockstep_schedule_is_simulated_in_seconds():
    """Seven packings of 98304 actions; about 1.3 s of CPU time, and a quadratic step would take minutes."""
    schedule, times = build("interleaved_zb", devices=32, microbatches=256, repeats=4), []
    for _ in range(2):
        start = time.process_time()
        timing = simulate(schedule, runtime="lockstep")
        times.append(time.process_time() - start)
    assert min(times) < 4.0
    assert timing.makespan == 256 * 3 + 31 / 4


def test_a_large_schedule_is_simulated_quickly():
    schedule = build("interleaved_1f1b", devices=32, microbatches=256, repeats=4)
    times = []
    for _ in range(2):
        start = time.process_time()
        timing = simulate(schedule)
        times.append(time.process_time() - start)
    assert min(times) < 2.0
    assert timing.bubble_time == pytest.approx(31 * 3 / 4)


def test_a_head_of_all_devices_is_paid_once_per_microbatch():
    schedule = build("1f1b", devices=4, microbatches=8)
    for runtime in ("lockstep", "lockstep_local"):
        plain, timing = simulate(schedule, Costs(), runtime), simulate(schedule, Costs(head=0.5), runtime)
        assert timing.makespan == plain.makespan + 8 * 0.5
        assert [end - start for start, end in timing.heads] == [0.5] * 8
        assert plain.heads == () and timing.bubble_time == pytest.approx(plain.bubble_time)
    # [1] One after the other, charged to the last stage's forward: no more than that stage's other work takes.
    timing = simulate(schedule, Costs(head=0.5))
    assert timing.makespan == simulate(schedule).makespan + 8 * 0.5 and timing.heads == ()


def test_devices_meet_before_the_head_and_go_on_together():
    """Ticks of `single`: 0F0 | 0F1 1F0 head | 1B0 | 0B0 1F1 head | 1B1 | 0B1; before a head nobody runs backwards."""
    schedule = build("1f1b", devices=2, microbatches=2)
    for runtime in ("lockstep", "lockstep_local"):
        timing = simulate(schedule, Costs(1, 1, 1, head=0.5), runtime, packing="single")
        assert timing.heads == ((2.0, 2.5), (5.5, 6.0))
        starts = {str(action): start for row in timing.busy for start, _, action in row}
        assert starts["1B0"] == 2.5 and starts["1F1"] == 4.5 and starts["0B0"] == 6.0
        assert timing.idle[0][-1][1] == starts["0B1"]


def test_the_last_head_ends_a_forward_only_schedule():
    timing = simulate(build("inference", devices=2, microbatches=2), Costs(head=0.25), "lockstep")
    assert timing.makespan == 3 + 2 * 0.25 and timing.heads[-1][1] == timing.makespan


@given(
    st.sampled_from(["gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v", "dualpipe_v", "inference"]),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.25]),
    st.sampled_from(["async", "lockstep"]),  # local lanes run what is best for `lockstep`
)
@settings(max_examples=40, deadline=None)
def test_a_dearer_head_is_never_faster(name, p, hop, runtime):
    schedule = build(name, devices=p, microbatches=2 * p + 1)
    times = [simulate(schedule, Costs(hop=hop, head=head), runtime).makespan for head in (0.0, 0.1, 0.5, 2.0)]
    assert times == sorted(times)
