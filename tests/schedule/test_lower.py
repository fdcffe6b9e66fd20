"""Tick tables: pictures, and replay on paper of every schedule under every packing, mutations included."""

import random
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from jaxpipe.errors import ScheduleError
from jaxpipe.schedule import CATALOG, Costs, build, lower, verify
from jaxpipe.schedule.ir import Action, Schedule
from jaxpipe.schedule.lowering.lower import tabulate
from jaxpipe.schedule.lowering.pack import order_peak, packings
from jaxpipe.schedule.lowering.replay import check
from jaxpipe.schedule.lowering.table import ModelBytes, TickTable


def picture(table: TickTable) -> str:
    """One line per device, one cell per tick; actions of a tick are joined by +."""
    rows = [
        ["+".join(map(str, table.actions(tick, device))) or "." for tick in range(table.ticks)]
        for device in range(table.schedule.devices)
    ]
    return "\n".join(" ".join(row) for row in rows)


def column(table: TickTable, name: str) -> list[str]:
    """A column as one line per device, `.` for -1."""
    return [
        " ".join("." if row[device] < 0 else str(row[device]) for row in table.columns[name])
        for device in range(table.schedule.devices)
    ]


def test_picture_of_1f1b_paired_and_single():
    schedule = build("1f1b", devices=2, microbatches=3)
    assert picture(lower(schedule, "paired")) == "0F0 0F1 0F2+0B0 0B1 0B2\n. 1F0+1B0 1F1+1B1 1F2+1B2 ."
    assert picture(lower(schedule, "single")) == "0F0 0F1 . 0B0 0F2 0B1 . 0B2\n. 1F0 1B0 1F1 1B1 1F2 1B2 ."


def test_columns_of_a_single_split_backward():
    table = lower(build("zb_h1", devices=2, microbatches=2), "single")
    assert picture(table) == "0F0 0F1 . 0I0 0W0 0I1 0W1\n. 1F0 1I0 1F1 1I1 1W0 1W1"
    assert column(table, "f_send") == ["1 1 . . . . .", ". . . . . . ."]
    assert column(table, "f_arrival") == [". . . . . . .", ". 0 1 . . . ."]
    assert column(table, "f_activation") == ["0 1 . . . . .", ". 0 . 1 . . ."]
    assert column(table, "b_input_only") == [". . . 1 . 1 .", ". . 1 . 1 . ."]
    assert column(table, "b_send") == [". . . . . . .", ". . 0 . 0 . ."]
    assert column(table, "b_weight_residual") == [". . . 0 . 0 .", ". . 0 . 1 . ."]
    assert column(table, "w_weight_residual") == [". . . . 0 . 0", ". . . . . 0 1"]
    assert [(p.start, p.stop, p.forward, p.head, p.backward, p.weight) for p in table.phases] == [
        (0, 2, True, True, False, False),
        (2, 4, True, True, True, False),
        (4, 6, False, False, True, True),
        (6, 7, False, False, False, True),
    ]


def test_the_ends_are_known_to_all_devices():
    """What stage 0 embeds, whose head runs and whose first stage runs backwards stands in every device's column."""
    table = lower(build("zb_h1", devices=2, microbatches=2), "single")
    assert picture(table) == "0F0 0F1 . 0I0 0W0 0I1 0W1\n. 1F0 1I0 1F1 1I1 1W0 1W1"
    assert column(table, "e_microbatch") == ["0 1 . . . . ."] * 2
    assert column(table, "h_microbatch") == [". 0 . 1 . . ."] * 2
    assert column(table, "g_microbatch") == [". . . 0 . 1 ."] * 2
    bare = lower(build("inference", devices=2, microbatches=2))
    assert column(bare, "h_microbatch") == [". 0 1"] * 2 and column(bare, "g_microbatch") == [". . ."] * 2


@pytest.mark.parametrize("name", ["h_microbatch", "e_microbatch", "g_microbatch"])
@pytest.mark.parametrize("change", [1, -1])
def test_replay_rejects_an_end_that_one_device_does_not_know(name, change):
    table = lower(build("interleaved_1f1b", devices=3, microbatches=6))
    rows = [list(row) for row in table.columns[name]]
    rows[next(t for t, row in enumerate(rows) if row[0] >= 0)][1] += change
    with pytest.raises(ScheduleError, match=f"device 1: {name} must be 0, as stage"):
        check(replace(table, columns=table.columns | {name: tuple(map(tuple, rows))}))


def test_columns_of_a_snake():
    """Forwards go right, turn on the last device without a hop, and come back left; gradients the other way."""
    order = ("0F0 3F0 3B0 0B0", "1F0 2F0 2B0 1B0")
    rows = tuple(tuple(Action.parse(cell) for cell in row.split()) for row in order)
    table = check(lower(verify(Schedule("snake", 2, 1, 2, "v", rows)), "paired"))
    assert picture(table) == "0F0 . . 3F0+3B0 . . 0B0\n. 1F0 2F0 . 2B0 1B0 ."
    assert column(table, "f_send") == ["1 . . . . . .", ". 2 0 . . . ."]
    assert column(table, "f_arrival") == [". . . . . . .", ". 0 . . . . ."]
    assert column(table, "f_arrival_own") == [". . . . . . .", ". . 1 . . . ."]
    assert column(table, "f_arrival_right") == [". . . 1 . . .", ". . . . . . ."]
    assert column(table, "b_send") == [". . . 1 . . .", ". . . . 2 0 ."]
    assert column(table, "b_arrival_left") == [". . . . . . .", ". . . . 0 . ."]
    assert column(table, "b_arrival_own") == [". . . . . . .", ". . . . . 0 ."]
    assert column(table, "b_arrival") == [". . . . . . 0", ". . . . . . ."]


@st.composite
def orders(draw) -> Schedule:
    """Any order that can run: a random walk over the actions whose values exist."""
    devices, repeats, m = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    placement = draw(st.sampled_from(["loop", "v"]))
    trains = draw(st.sampled_from(["F", "B", "IW", "mixed"]))
    pick = random.Random(draw(st.integers(0, 10**6)))
    empty = Schedule("walk", devices, m, repeats, placement, ())
    last, done, rows = empty.stages - 1, set(), [[] for _ in range(devices)]
    split = {
        (s, k): trains == "IW" or (trains == "mixed" and pick.random() < 0.5) for s in range(last + 1) for k in range(m)
    }
    todo = {("F", s, k) for s, k in split}
    if trains != "F":
        todo |= {("G", s, k) for s, k in split} | {("W", s, k) for s, k in split if split[s, k]}

    def ready(phase, s, k):
        if phase == "F":
            return s == 0 or ("F", s - 1, k) in done
        if phase == "W":
            return ("G", s, k) in done
        return ("F", s, k) in done and (s == last or ("G", s + 1, k) in done)

    while todo:
        step = pick.choice(sorted(t for t in todo if ready(*t)))
        todo.remove(step)
        done.add(step)
        phase, s, k = step
        letter = ("I" if split[s, k] else "B") if phase == "G" else phase
        rows[empty.device_of(s)].append(Action(s, letter, k))  # pyright: ignore[reportArgumentType]
    return verify(replace(empty, order=tuple(map(tuple, rows))))


@given(orders())
@settings(max_examples=60, deadline=None)
def test_any_order_that_verifies_lowers_and_replays(schedule):
    for packed in packings(schedule, "auto"):
        check(tabulate(packed))
        if packed.schedule.order == schedule.order:
            assert packed.peak_stages() == order_peak(schedule) or packed.packing == "paired"
            assert all(a <= b for a, b in zip(packed.peak_stages(), order_peak(schedule), strict=True))
    for packing in ("auto", "paired", "single"):
        table = lower(schedule, packing)
        assert sorted(table.schedule.order[0]) == sorted(schedule.order[0])


@pytest.mark.parametrize("name", CATALOG)
def test_every_family_replays_under_every_packing(name):
    least = CATALOG[name].least
    for devices in (1, 2, 3, 4):
        for extra in (0, 3):
            for repeats in (1, 2, 3) if CATALOG[name].repeats is None else (None,):
                m = least[0] * devices + least[1] + extra
                for packed in packings(build(name, devices=devices, microbatches=m, repeats=repeats), "auto"):
                    check(tabulate(packed))


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_replay_rejects_an_erased_number(data):
    """No number in a table is idle."""
    name = data.draw(st.sampled_from(["interleaved_1f1b", "zb_h1", "zb_v", "dualpipe_v"]))
    table = lower(build(name, devices=2, microbatches=4), "single")
    key = data.draw(st.sampled_from([k for k, rows in table.columns.items() if any(max(row) >= 0 for row in rows)]))
    places = [(t, d) for t, row in enumerate(table.columns[key]) for d, n in enumerate(row) if n >= 0]
    tick, device = data.draw(st.sampled_from(places))
    rows = [list(row) for row in table.columns[key]]
    rows[tick][device] = -1
    with pytest.raises(ScheduleError, match=r"tick|runs"):
        check(replace(table, columns=table.columns | {key: tuple(map(tuple, rows))}))


def test_replay_rejects_two_live_values_in_one_slot():
    table = lower(build("1f1b", devices=2, microbatches=4), "single")
    rows = tuple(tuple(min(n, 0) for n in row) for row in table.columns["f_residual"])
    with pytest.raises(ScheduleError, match="residual slot"):
        check(replace(table, columns=table.columns | {"f_residual": rows}))


def test_inference_keeps_nothing():
    table = check(lower(build("inference", devices=4, microbatches=8, repeats=2)))
    assert (table.slots.activation, table.slots.residual, table.slots.gradient) == (1, 0, 0)
    assert table.ticks == 8 * 2 + 3
    assert [(p.forward, p.backward, p.weight) for p in table.phases] == [(True, False, False)]


def test_notes_say_what_was_moved():
    (note,) = lower(build("1f1b", devices=4, microbatches=8)).notes
    assert "device 0 keeps 7 stage inputs instead of 4" in note
    (note,) = lower(build("zb_h1", devices=4, microbatches=8), costs=Costs(1, 3, 1)).notes
    assert "memory='strict' keeps 4" in note
    assert lower(build("zb_h1", devices=4, microbatches=8), memory="strict").notes == ()


def test_bytes_count_split_backwards_and_two_way_hops():
    model = ModelBytes(1, 10, 0, 0, 0, 0, weight_residual=100)
    table = lower(build("zb_v", devices=2, microbatches=4), "single")
    terms = table.bytes(model)
    assert terms["weight-residual slots"] == 100 * (table.slots.weight_residual + 1)
    assert terms["four carries"] == 4 and "two carries" not in terms
    assert "weight-residual slots" not in lower(build("1f1b", devices=2, microbatches=4)).bytes(model)


@pytest.mark.parametrize("option", [{"packing": "tight"}, {"memory": "none"}])
def test_unknown_options_are_refused(option):
    with pytest.raises(ScheduleError, match="try"):
        lower(build("1f1b", devices=2, microbatches=2), **option)


@pytest.mark.slow
def test_a_large_schedule_lowers_in_seconds():
    schedule = build("interleaved_1f1b", devices=32, microbatches=256, repeats=4)
    start = time.process_time()
    table = lower(schedule)
    assert table.ticks == 256 * 4 + 31 + 4 * 32 - 1
    assert time.process_time() - start < 20  # about 2 s on one core; a quadratic step would take minutes
