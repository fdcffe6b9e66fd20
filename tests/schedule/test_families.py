"""Every family against what it declares: its picture, its bubble and its memory."""

import importlib

import pytest
from hypothesis import given, settings, strategies as st

from jaxpipe.schedule import CATALOG, Costs, Schedule, build, show, simulate, verify
from jaxpipe.schedule.families.interleaved import group_sizes

PICTURES = {
    "gpipe": """\
gpipe P=3 M=3 V=1 loop
0F0 0F1 0F2 .   .   .   .   0B0 0B1 0B2
.   1F0 1F1 1F2 .   .   1B0 1B1 1B2 .
.   .   2F0 2F1 2F2 2B0 2B1 2B2 .   .
""",
    "circular": """\
circular P=2 M=2 V=2 loop
0F0 0F1 2F0 2F1 .   .   2B1 2B0 0B1 0B0
.   1F0 1F1 3F0 3F1 3B1 3B0 1B1 1B0 .
""",
    "breadth_first": """\
breadth_first P=2 M=3 V=2 loop
0F0 0F1 0F2 2F0 2F1 2F2 .   .   2B2 2B1 2B0 0B2 0B1 0B0
.   1F0 1F1 1F2 3F0 3F1 3F2 3B2 3B1 3B0 1B2 1B1 1B0 .
""",
    "1f1b": """\
1f1b P=3 M=4 V=1 loop
0F0 0F1 0F2 .   .   0B0 0F3 0B1 .   0B2 .   0B3
.   1F0 1F1 .   1B0 1F2 1B1 1F3 1B2 .   1B3 .
.   .   2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3 .   .
""",
    "eager_1f1b": """\
eager_1f1b P=3 M=4 V=1 loop
0F0 0F1 0F2 0F3 .   0B0 .   0B1 .   0B2 .   0B3
.   1F0 1F1 1F2 1B0 1F3 1B1 .   1B2 .   1B3 .
.   .   2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3 .   .
""",
    "interleaved_1f1b": """\
interleaved_1f1b P=2 M=4 V=2 loop
0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 .   2B2 .   2B3 0B2 0B3
.   1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3 .
""",
    "zb_h1": """\
zb_h1 P=3 M=4 V=1 loop
0F0 0F1 0F2 .   .   0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3
.   1F0 1F1 .   1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3
.   .   2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3
""",
    "zb_h2": """\
zb_h2 P=2 M=4 V=1 loop
0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3 .
.   1F0 1I0 1F1 1I1 1F2 1I2 1W0 1F3 1I3 1W1 1W2 1W3
""",
    "interleaved_zb": """\
interleaved_zb P=2 M=2 V=2 loop
0F0 0F1 2F0 2F1 .   2I0 2W0 2I1 0I0 0I1 2W1 0W0 0W1
.   1F0 1F1 3F0 3I0 3F1 3I1 1I0 1I1 3W0 3W1 1W0 1W1
""",
    "zb_v": """\
zb_v P=2 M=3 V=2 v
0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2 .
.   1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2
""",
    "v_half": """\
v_half P=2 M=3 V=2 v
0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 0I0 3W1 0W0 3F2 3I2 0I1 3W2 0I2 0W1 0W2 .
.   1F0 2F0 1F1 2F1 2I0 1I0 2W0 1F2 1W0 2F2 2I1 1I1 2I2 1I2 2W1 1W1 2W2 1W2
""",
    "v_min": """\
v_min P=2 M=3 V=2 v
0F0 .   .   3F0 3I0 3W0 0F1 0I0 0W0 3F1 3I1 3W1 0F2 0I1 0W1 3F2 3I2 3W2 .   0I2 0W2
.   1F0 2F0 .   .   2I0 1I0 1F1 2F1 2W0 1W0 2I1 1I1 1F2 2F2 2W1 1W1 2I2 1I2 2W2 1W2
""",
    "dualpipe_v": """\
dualpipe_v P=2 M=4 V=2 v
0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3 3B1 3F2 0B0 3B2 3F3 0B1 3B3 0I2 0W2 0I3 0W3
.   1F0 2F0 1F1 2F1 1F2 2B0 2F2 1B0 1F3 2B1 2F3 1B1 2B2 1B2 2I3 1I3 2W3 1W3
""",
    "inference": """\
inference P=2 M=4 V=2 loop
0F0 0F1 2F0 2F1 0F2 0F3 2F2 2F3 .
.   1F0 1F1 3F0 3F1 1F2 1F3 3F2 3F3
""",
}

SHAPES = [
    (1, 1),
    (1, 4),
    (2, 1),
    (2, 3),
    (2, 8),
    (3, 2),
    (3, 7),
    (4, 3),
    (4, 4),
    (4, 9),
    (5, 11),
    (7, 14),
    (8, 16),
    (8, 33),
]
LARGE = [(12, 29), (13, 64), (16, 31), (16, 64)]
TIMES = [(1.0, 1.0, 1.0), (1.0, 1.1, 0.9), (2.0, 2.0, 1.0), (1.0, 2.1, 0.9), (3.0, 1.0, 0.5), (1.0, 0.5, 1.5)]


def legal(name: str, p: int, m: int) -> bool:
    factor, plus = CATALOG[name].least
    return m >= factor * p + plus


def repeats_of(name: str, p: int) -> tuple[int, ...]:
    only = CATALOG[name].repeats
    return (only,) if only else (1, 2, 3, 4) if p <= 8 else (2, 4)


def idle_time(name: str, schedule: Schedule, f: float, i: float, w: float) -> float:
    """Simulated idle time per device in the measure that the family declares."""
    timing = simulate(schedule, Costs(f, i, w))
    spans = [row[-1].end - row[0].start for row in timing.busy]
    total = timing.makespan if CATALOG[name].measure == "makespan" else max(spans)
    return total - schedule.microbatches * (f if schedule.phases == {"F"} else f + i + w)


@pytest.mark.parametrize("name", CATALOG)
def test_picture(name):
    head = PICTURES[name].split()
    p, m, v = (int(word[2:]) for word in head[1:4])
    assert show.text(build(name, devices=p, microbatches=m, repeats=v)) == PICTURES[name].strip()


@pytest.mark.parametrize("name", CATALOG)
def test_docstring_shows_the_same_picture(name):
    module = importlib.import_module(CATALOG[name].order.__module__)
    lines = [line[4:] for line in (module.__doc__ or "").splitlines() if line.startswith("    ")]
    assert PICTURES[name].strip() in "\n".join(lines)


@pytest.mark.parametrize("name", CATALOG)
def test_bubble_and_peak_match_the_declared_form(name):
    family = CATALOG[name]
    exact = 0
    for p, m in [shape for shape in SHAPES + LARGE if legal(name, *shape)]:
        for v in repeats_of(name, p):
            schedule = verify(build(name, devices=p, microbatches=m, repeats=v))
            for f, i, w in TIMES if (p, m) in SHAPES else TIMES[:2]:
                claim, form = family.bubble_claim(p, m, v, f, i, w), family.bubble(p, m, v, f, i, w)
                if claim == "about":
                    continue
                exact += 1
                idle = idle_time(name, schedule, f, i, w)
                if claim == "exact":
                    assert idle == pytest.approx(form, abs=1e-9), (p, m, v, f, i, w)
                else:
                    assert idle <= form + 1e-9, (p, m, v, f, i, w)
            peaks, forms = simulate(schedule).peak_activations, [family.peak(p, m, v, d) for d in range(p)]
            if family.peak_claim == "exact":
                assert peaks == pytest.approx(forms), (p, m, v)
            else:
                assert all(peak <= form + 1e-9 for peak, form in zip(peaks, forms, strict=True)), (p, m, v)
    assert exact >= 10


@pytest.mark.parametrize("name", CATALOG)
def test_every_family_keeps_microbatches_in_index_order_on_its_first_stage(name):
    schedule = build(name, devices=4, microbatches=9)
    forwards = [a.microbatch for a in schedule.order[0] if a.phase == "F" and a.stage == 0]
    assert forwards == list(range(9))


def test_zb_h1_keeps_1f1b_memory_and_has_a_third_of_its_bubble_at_equal_times():
    one, split = (simulate(build(name, devices=8, microbatches=32)) for name in ("1f1b", "zb_h1"))
    assert max(split.peak_activations) == max(one.peak_activations) == 8
    assert split.bubble_time == pytest.approx(one.bubble_time / 3)


def test_snake_families_order_by_memory_as_declared():
    peaks = [max(simulate(build(n, devices=8, microbatches=32)).peak_activations) for n in ("v_min", "v_half", "zb_v")]
    assert peaks == [4, 5, 8]


def test_v_min_idles_with_every_microbatch_where_the_input_gradient_is_long():
    idle = [idle_time("v_min", build("v_min", devices=8, microbatches=m), 1.0, 2.0, 1.0) for m in (16, 32, 64)]
    assert idle[2] - idle[1] == pytest.approx(2 * (idle[1] - idle[0]))
    assert idle[1] > idle[0] + 8


@pytest.mark.parametrize(("p", "v", "m"), [(4, 3, 5), (4, 4, 9), (4, 2, 3), (5, 3, 2), (3, 4, 7)])
def test_interleaved_runs_where_a_compact_short_group_deadlocks(p, v, m):
    schedule = verify(build("interleaved_1f1b", devices=p, microbatches=m, repeats=v))
    assert simulate(schedule).bubble_time == pytest.approx((p - 1 + (v - 1) * max(0, p - m)) * 3 / v)


def test_interleaved_of_one_repeat_is_eager_1f1b():
    for p, m in [(1, 1), (3, 2), (4, 6), (5, 13)]:
        assert (
            build("interleaved_1f1b", devices=p, microbatches=m).order
            == build("eager_1f1b", devices=p, microbatches=m).order
        )


@pytest.mark.parametrize(
    ("p", "v", "m", "n"), [(4, 2, 16, 4), (4, 2, 16, 8), (4, 3, 13, 4), (2, 2, 7, 3), (3, 4, 10, 10)]
)
def test_interleaved_group_size_verifies_and_stays_ideal_where_the_last_group_is_full(p, v, m, n):
    schedule = verify(build("interleaved_1f1b", devices=p, microbatches=m, repeats=v, group_size=n))
    timing = simulate(schedule)
    if m % n == 0 or m % n >= p:
        assert timing.bubble_time == pytest.approx((p - 1) * 3 / v)
    assert timing.peak_activations[0] <= min((v - 1) * n + 2 * p - 1, m * v) / v


def test_interleaved_group_size_of_devices_is_megatrons_order():
    """Warm-up 2(P-1-i) + (V-1)P forwards, then one forward and one backward in turn, by Megatron's k-rule."""
    p, v, m = 4, 2, 8
    schedule = build("interleaved_1f1b", devices=p, microbatches=m, repeats=v, group_size=p)

    def action(k: int, i: int, phase: str) -> str:
        c = k % (p * v) // p
        return f"{(v - 1 - c if phase == 'B' else c) * p + i}{phase}{k // (p * v) * p + k % p}"

    for i in range(p):
        w = min(2 * (p - 1 - i) + (v - 1) * p, m * v)
        order = [action(k, i, "F") for k in range(w)]
        for k in range(m * v - w):
            order += [action(w + k, i, "F"), action(k, i, "B")]
        order += [action(k, i, "B") for k in range(m * v - w, m * v)]
        assert [str(a) for a in schedule.order[i]] == order


@given(st.integers(1, 12), st.integers(1, 60))
@settings(derandomize=True, max_examples=100, deadline=None)
def test_balanced_groups_are_balanced(p, m):
    sizes = group_sizes(p, m)
    assert sum(sizes) == m and max(sizes) - min(sizes) <= 1
    assert m < p or min(sizes) >= p


@given(st.data(), st.sampled_from(sorted(CATALOG)))
@settings(derandomize=True, max_examples=150, deadline=None)
def test_legal_inputs_verify_and_simulate(data, name):
    p = data.draw(st.integers(1, 7))
    factor, plus = CATALOG[name].least
    m = data.draw(st.integers(max(1, factor * p + plus), max(1, factor * p + plus) + 12))
    v = CATALOG[name].repeats or data.draw(st.integers(1, 4))
    schedule = verify(build(name, devices=p, microbatches=m, repeats=v))
    work = 1.0 if name == "inference" else 3.0
    for runtime in ("async", "lockstep", "lockstep_local"):
        timing = simulate(schedule, Costs(hop=0.25), runtime)
        assert timing.makespan >= m * work - 1e-9
        assert 0 <= timing.span_bubble <= timing.bubble + 1e-12
        assert max(timing.peak_activations) <= m + 1e-9
