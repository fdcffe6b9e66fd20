"""Text forms: what is written is read back, and what breaks a rule is refused with its row, cell and rule."""

import json

import pytest
from hypothesis import given, settings, strategies as st

from jaxpipe.errors import ScheduleError
from jaxpipe.schedule import CATALOG, Costs, Schedule, build
from jaxpipe.schedule.forms.text import from_csv, from_json, parse, to_csv, to_json

TORCH_INTERLEAVED = "0F0,0F1,2F0,2F1,,,,2B0,,2B1,,0B0,,0B1\n,1F0,1F1,,3F0,3B0,3F1,3B1,,1B0,,1B1\n"
"""As torch.distributed.pipelining 2.13 writes it for 2 ranks, 2 stages per rank and 2 microbatches."""


def catalogue() -> list[Schedule]:
    return [
        build(name, devices=p, microbatches=8, repeats=family.repeats or v)
        for name, family in CATALOG.items()
        for p, v in ((1, 1), (2, 2), (4, 3))
    ]


@pytest.mark.parametrize("schedule", catalogue(), ids=lambda s: f"{s.name}-{s.devices}-{s.repeats}")
def test_every_text_form_reads_back_what_it_wrote(schedule):
    assert parse(str(schedule)) == schedule
    assert from_json(to_json(schedule)) == (schedule, None)
    if schedule.devices > 1:  # one device has no placement to tell
        assert from_csv(to_csv(schedule), name=schedule.name) == schedule
    assert from_csv(to_csv(schedule)).order == schedule.order


def test_a_schedule_whose_order_deadlocks_still_prints_and_parses():
    wrong = Schedule("mine of May", 2, 1, 1, "loop", tuple(reversed(build("1f1b", devices=2, microbatches=1).order)))
    assert parse(str(wrong)) == wrong


def test_csv_of_torch_reads_and_a_blank_cell_is_an_idle_place():
    schedule = from_csv(TORCH_INTERLEAVED)
    assert (schedule.devices, schedule.microbatches, schedule.repeats) == (2, 2, 2)
    assert schedule.order[1] == build("interleaved_1f1b", devices=2, microbatches=2, repeats=2).order[1]


def test_csv_places_actions_in_their_earliest_column():
    assert to_csv(build("gpipe", devices=2, microbatches=2)) == "0F0,0F1,,,0B0,0B1\n,1F0,1F1,1B0,1B1\n"


def test_an_overlap_pair_is_its_two_actions_in_order():
    pairs = "0F0,(0F1;0B0)OVERLAP_F_B,0B1\n"
    assert [str(action) for action in from_csv(pairs).order[0]] == ["0F0", "0F1", "0B0", "0B1"]


def test_placement_follows_from_the_rows():
    assert from_csv("0F0,3F0\n1F0,2F0\n").placement == "v"
    assert from_csv("0F0,2F0\n1F0,3F0\n").placement == "loop"


@pytest.mark.parametrize(
    "content", [TORCH_INTERLEAVED, "\ufeff" + TORCH_INTERLEAVED.replace("\n", "\r\n") + "\r\n\r\n"]
)
def test_a_path_reads_like_its_text_and_names_the_schedule(tmp_path, content):
    path = tmp_path / "of,mine.csv"
    path.write_bytes(content.encode())
    for source in (path, str(path)):
        schedule = from_csv(source)
        assert schedule.name == "of,mine"
        assert schedule.order == from_csv(TORCH_INTERLEAVED).order


ONE_STAGE = "0F0,0F1,0F2,0B0,0B1,0B2\n1F0,1F1,1F2,1B0,1B1,1B2\n"

BROKEN = {
    "trailing garbage": (("0F1", "0F1xyz"), "row 0, cell 1 '0F1xyz': must read STAGE", "'xyz' after 0F1 is too much"),
    "no action": (("1B2", "hello"), "row 1, cell 5 'hello': must read STAGE, one of F B I W, MICROBATCH"),
    "sign": (("0F0", "0F-1"), "row 0, cell 0 '0F-1'"),
    "foreign digits": (("0F1", "0F\u0661"), "row 0, cell 1 '0F\u0661'"),
    "very many digits": (("0F1", "0F" + "1" * 5000), "row 0, cell 1"),
    "communication": (("0F1,", "0F1,0SEND_F1,"), "row 0, cell 2 '0SEND_F1'", "export the compute-only form"),
    "twice in a row": (("0F1", "0F0"), "row 0, cell 1 0F0: an action may occur only once; it also is in cell 0"),
    "in a wrong row": (("1F2", "0F2"), "row 1, cell 2 0F2: stages must be placed as a loop", "belongs to row 0"),
    "microbatch out of range": (("0F2", "0F3"), "row 0, cell 2 0F3: its microbatch must be in 0..2"),
    "stage out of range": (("1B2", "9B2"), "row 1, cell 5 9B2: stages must be numbered without a gap", "stage 2"),
    "stages no multiple": (("1B2", "2B2"), "row 1, cell 5 2B2: there are 3 stages", "multiple of the 2 rows"),
    "missing": ((",1B2", ""), "row 1: 1B2 is missing"),
    "B and I+W": (("0B0,", "0B0,0I0,0W0,"), "row 0, cell 3 0B0: B already holds I and W"),
    "I without W": (("0B0", "0I0"), "row 0: 0W0 is missing: I and W come together"),
    "deadlock on one device": (
        ("1F0,1F1,1F2,1B0", ",1B0,1F0,1F1,1F2"),
        "row 1, cell 1 1B0: needs F of stage 1, microbatch 0",
    ),
    "pair of two forwards": (("0F1,0F2", "(0F1;0F2)OVERLAP_F_B"), "row 0, cell 1", "one F and one B or I"),
    "pair with a blank": (("0F1", "(0F1;)OVERLAP_F_B"), "row 0, cell 1 '': must read STAGE"),
    "pair of three": (("0F1", "(0F1;0B0;0B1)OVERLAP_F_B"), "row 0, cell 1 '(0F1;0B0;0B1)OVERLAP_F_B'"),
    "quoted": (("0F1", '"0F1"'), "row 0, cell 1"),
    "an empty row": (("\n1F0", "\n,,\n1F0"), "row 1 holds no action"),
}


@pytest.mark.parametrize(("change", "says"), [(c, s) for c, *s in BROKEN.values()], ids=BROKEN.keys())
def test_a_csv_that_breaks_a_rule_is_refused_with_row_cell_and_rule(change, says):
    old, new = change
    content = ONE_STAGE.replace(old, new, 1)
    assert content != ONE_STAGE
    with pytest.raises(ScheduleError) as refusal:
        from_csv(content)
    for words in says:
        assert words in str(refusal.value)


def test_an_order_that_deadlocks_across_rows_is_refused_at_its_column():
    crossed = "0F0,,0B0,0F1,0B1\n,,1F1,1F0,1B0,1B1\n"
    with pytest.raises(ScheduleError) as refusal:
        from_csv(crossed)
    first, *grid = str(refusal.value).splitlines()
    assert first == (
        "row 0, cell 2 0B0: needs B or I of stage 1, microbatch 0 before it, which device 1 never reaches: 1B0 is "
        "behind 1F1, and 1F1 needs F of stage 0, microbatch 1 before it, which device 0 never reaches: 0F1 is behind "
        "0B0 (deadlock)"
    )
    assert grid[0].startswith("0F0 >0B0<")


def test_a_row_numbered_from_one_is_found_in_its_own_row():
    shifted = "0F0,0F1,0B0,0B1\n,1F1,1F2,1B1,1B2\n"
    with pytest.raises(ScheduleError, match=r"row 1, cell 2 1F2: its microbatch must be in 0\.\.1"):
        from_csv(shifted)


@pytest.mark.parametrize("content", ["", "\n\n", ",,,\n,,", "0B0,0B1"])
def test_a_csv_without_forwards_is_refused(content):
    with pytest.raises(ScheduleError, match="the CSV holds no"):
        from_csv(content)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ScheduleError, match=r"csv file 'nowhere.csv' cannot be read: No such file"):
        from_csv("nowhere.csv")
    (tmp_path / "latin.csv").write_bytes(b"0F0,\xe9")
    with pytest.raises(ScheduleError, match="it is not UTF-8 text"):
        from_csv(tmp_path / "latin.csv")


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="01239FBIW,;()\n OVERLAP_x-", max_size=60))
def test_any_text_is_a_schedule_or_a_schedule_error(content):
    try:
        schedule = from_csv(content + "\n")
    except ScheduleError:
        return
    assert from_csv(to_csv(schedule)).order == schedule.order


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_dropped_doubled_or_renumbered_cell_is_refused(data):
    rows = [line.split(",") for line in to_csv(build("zb_v", devices=2, microbatches=4)).splitlines()]
    row = data.draw(st.sampled_from(rows))
    place = data.draw(st.sampled_from([n for n, cell in enumerate(row) if cell]))
    stage = row[place].rstrip("0123456789")
    row[place] = data.draw(st.sampled_from(["", f"{row[place]},{row[place]}", f"{stage}7", f"{row[place]}x"]))
    with pytest.raises(ScheduleError, match="row"):
        from_csv("\n".join(map(",".join, rows)))


@pytest.mark.parametrize(
    ("printed", "says"),
    [
        ("", "title '' must read NAME"),
        ("1f1b P=2 M=1 V=1 ring\n0F0\n1F0", "loop or v"),
        ("1f1b P=2 M=1 V=1 loop\n0F0", "has 1 rows but must have one for each of P=2 devices"),
        ("1f1b P=1 M=1 V=1 loop\n0F0 .  0X0", "row 0, cell 2 '0X0'"),
    ],
)
def test_a_grid_that_is_none_is_refused(printed, says):
    with pytest.raises(ScheduleError) as refusal:
        parse(printed)
    assert says in str(refusal.value)


def test_json_keeps_costs_and_says_what_it_is():
    schedule = build("zb_h1", devices=2, microbatches=3)
    costs = Costs(forward=(1.0, 2.0), backward_input=1.1, hop=0.25, head=0.5)
    written = to_json(schedule, costs)
    assert json.loads(written)["format"] == "jaxpipe.schedule"
    assert from_json(written) == (schedule, costs)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "x"}, '"format": "jaxpipe.schedule"'),
        ({"devices": 0}, "devices=0 must be a positive int"),
        ({"devices": True}, "devices=True"),
        ({"placement": "ring"}, "placement='ring' must be 'loop' or 'v'"),
        ({"order": [[1]]}, "order must be a list of lists"),
        ({"order": [["0F0x"], []]}, "row 0, cell 0 '0F0x'"),
        ({"costs": {"forwards": 1}}, "must hold only forward"),
        ({"costs": {"forward": "1"}}, "must be a number"),
        ({"costs": {"hop": [1]}}, "must be a number"),
        ({"costs": {"hop": -1}}, "hop=-1 must not be negative"),
        ({"costs": {"head": [1, 2]}}, "costs head=[1, 2] must be a number"),
        ({"microbatches": 3}, "is missing"),
    ],
)
def test_json_that_is_no_schedule_is_refused(change, says):
    content = json.loads(to_json(build("1f1b", devices=2, microbatches=2))) | change
    with pytest.raises(ScheduleError) as refusal:
        from_json(json.dumps(content))
    assert says in str(refusal.value)


@pytest.mark.parametrize("content", ["{", "{} {}", "{" * 9000])
def test_text_that_is_no_json_is_refused(content):
    with pytest.raises(ScheduleError, match="JSON"):
        from_json(content)
