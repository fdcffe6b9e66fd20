"""`jaxpipe schedule`: numbers, files, comparisons, and one line for every wrong input."""

import json
import subprocess
import sys

import pytest

from jaxpipe.cli.main import main
from jaxpipe.schedule import CATALOG, Costs, build, from_csv, from_json, simulate, to_csv, to_json

SHAPE = ["--devices", "4", "--microbatches", "8"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ask(capsys, *arguments: str) -> str:
    assert main(["schedule", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refuse(capsys, *arguments: str) -> str:
    assert main(["schedule", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("jaxpipe: error: ")
    return err


def test_prints_the_grid_and_its_numbers(capsys):
    out = ask(capsys, "interleaved_1f1b", *SHAPE, "--repeats", "2")
    assert out.startswith(
        str(build("interleaved_1f1b", devices=4, microbatches=8, repeats=2)) + "\n\nmakespan     28.5 "
    )
    assert "15.8% of the makespan" in out
    assert "5.5, 4.5, 3.5, 2.5 A on devices 0..3" in out
    assert "112 transfers" in out


@pytest.mark.parametrize("runtime", ["async", "lockstep", "lockstep_local"])
def test_json_has_the_simulator_s_numbers(capsys, runtime):
    answer = json.loads(
        ask(capsys, "zb_h1", *SHAPE, "--costs", "1,1.1,.9", "--hop", "0.1", "--runtime", runtime, "--json")
    )
    timing = simulate(build("zb_h1", devices=4, microbatches=8), Costs(1.0, 1.1, 0.9, hop=0.1), runtime)
    assert answer["makespan"] == timing.makespan
    assert (answer["bubble"], answer["span_bubble"]) == (timing.bubble, timing.span_bubble)
    assert tuple(answer["peak_activations"]) == timing.peak_activations
    assert (answer["hops"], answer["runtime"]) == (48, runtime)
    assert answer["costs"]["backward_input"] == 1.1


def test_compare_is_sorted_and_says_what_it_left_out(capsys):
    out = ask(capsys, "--compare", "1f1b,zb_h1,zb_v,dualpipe_v", "--devices", "4", "--microbatches", "7")
    head, *rows = out.splitlines()
    assert head.split() == ["schedule", "makespan", "bubble", "span", "bubble", "peak", "memory", "hops"]
    assert [row.split()[0] for row in rows[:3]] == ["zb_v", "zb_h1", "1f1b"]
    assert rows[3].startswith("left out: dualpipe_v: microbatches=7 must be at least 2*devices=8")
    answer = json.loads(ask(capsys, "--compare", "1f1b,zb_v", *SHAPE, "--json"))
    assert [one["name"] for one in answer["schedules"]] == ["zb_v", "1f1b"]
    assert answer["schedules"][1]["makespan"] == 33.0


def test_compare_gives_repeats_to_the_families_that_take_them(capsys):
    out = ask(capsys, "--compare", "all", *SHAPE, "--repeats", "2")
    names = [row.split()[:2] for row in out.splitlines()[1:]]
    assert ["interleaved_1f1b", "V=2"] in names
    assert ["1f1b", "V=1"] in names
    assert len(names) == len(CATALOG) - 1  # all that train


def test_list_names_the_catalogue(capsys):
    assert [row.split()[0] for row in ask(capsys, "--list").splitlines()[1:]] == list(CATALOG)
    assert [one["name"] for one in json.loads(ask(capsys, "--list", "--json"))] == list(CATALOG)


@pytest.mark.parametrize(
    ("suffix", "begin"),
    [
        ("svg", b"<svg"),
        ("png", b"\x89PNG"),
        ("html", b"<!DOCTYPE"),
        ("csv", b"0F0,"),
        ("trace.json", b'{"traceEvents"'),
    ],
)
def test_out_writes_what_the_suffix_says(capsys, folder, suffix, begin):
    if suffix == "png":
        pytest.importorskip("matplotlib", reason="needs matplotlib (extra viz)")
    out = ask(capsys, "1f1b", "--devices", "2", "--microbatches", "2", "--out", f"x.{suffix}")
    assert out.endswith(f"wrote x.{suffix}\n")
    assert (folder / f"x.{suffix}").read_bytes().startswith(begin)


def test_csv_and_json_go_out_and_come_back(capsys, folder):
    schedule = build("zb_v", devices=4, microbatches=8)
    for name in ("x.csv", "x.json"):
        ask(capsys, "zb_v", *SHAPE, "--hop", "0.5", "--out", name)
    assert from_csv(folder / "x.csv").order == schedule.order
    assert from_json(folder / "x.json") == (schedule, Costs(hop=0.5))
    stored = json.loads(ask(capsys, "--from", "x.json", "--json"))
    assert stored["makespan"] == simulate(schedule, Costs(hop=0.5)).makespan
    given = json.loads(ask(capsys, "--from", "x.json", "--hop", "0", "--json"))
    assert given["makespan"] == simulate(schedule).makespan


def test_costs_per_stage(capsys):
    answer = json.loads(
        ask(capsys, "inference", "--devices", "3", "--microbatches", "8", "--costs", ".1:.2:.15,0,0", "--json")
    )
    assert answer["makespan"] == pytest.approx(1.85)


BAD = {
    "unknown name": (["1f1", *SHAPE], "try '1f1b'"),
    "unknown name to compare": (["--compare", "1f1b,zb_1", *SHAPE], "schedule='zb_1' is not one of"),
    "nothing": ([], "nothing to show; give one of NAME, --compare, --from, --list"),
    "two things": (["1f1b", "--list"], "NAME and --list exclude each other"),
    "no devices": (["1f1b", "--microbatches", "4"], "--devices must be given"),
    "no sizes": (["1f1b"], "--devices and --microbatches must be given; try --devices 4 --microbatches 4"),
    "size without effect": (["--from", "x.csv", "--devices", "4"], "--devices has no effect with --from"),
    "cost without effect": (["--list", "--hop", "1"], "--hop has no effect with --list"),
    "devices": (["1f1b", "--devices", "0", "--microbatches", "4"], "devices=0 must be a whole number of at least 1"),
    "repeats": (["1f1b", *SHAPE, "--repeats", "2"], "repeats=2 must be 1 for 1f1b"),
    "negative cost": (["1f1b", *SHAPE, "--costs", "1,-1,1"], "backward_input=-1.0 must not be negative"),
    "negative hop": (["1f1b", *SHAPE, "--hop", "-1"], "hop=-1.0 must not be negative"),
    "hop not finite": (["1f1b", *SHAPE, "--hop", "nan"], "--hop nan must be a finite number"),
    "two costs": (["1f1b", *SHAPE, "--costs", "1,1"], "--costs '1,1' has 2 numbers but must have 3"),
    "cost no number": (["1f1b", *SHAPE, "--costs", "1,x,1"], "'x' must be a number"),
    "costs per stage": (["1f1b", *SHAPE, "--costs", "1:2,1,1"], "forward has 2 numbers but must have one per stage"),
    "suffix": (["1f1b", *SHAPE, "--out", "x.jpg"], "must end in one of .svg, .png, .html, .csv, .trace.json, .json"),
    "no suffix": (["1f1b", *SHAPE, "--out", "x"], "try 'x.svg'"),
    "no folder": (["1f1b", *SHAPE, "--out", "no/x.svg"], "--out 'no/x.svg' cannot be written: No such file"),
    "compare to csv": (["--compare", "1f1b,gpipe", *SHAPE, "--out", "x.csv"], "holds one schedule but --compare has 2"),
    "nothing to compare": (["--compare", "zb_v", "--devices", "4", "--microbatches", "2"], "no schedule to compare: "),
    "no file": (["--from", "no.csv"], "csv file 'no.csv' cannot be read: No such file"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_wrong_input_exits_2_with_one_line(capsys, folder, arguments, message):
    err = refuse(capsys, *arguments)
    assert message in err
    assert len(err.splitlines()) == 1
    assert list(folder.iterdir()) == []


def test_a_file_that_breaks_a_rule_shows_where_and_the_grid_below(capsys, folder):
    (folder / "bad.csv").write_text("0F0,,0B0\n,1B0,1F0\n")
    first, *grid = refuse(capsys, "--from", "bad.csv").splitlines()
    assert "row 1, cell 1 1B0: needs F of stage 1, microbatch 0 before it" in first
    assert any(">1B0<" in row for row in grid)


@pytest.mark.parametrize("arguments", [["--runtime", "warp"], ["--devices", "four"], ["--hop", "x"]])
def test_wrong_arguments_exit_2(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(["schedule", "1f1b", *arguments])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("(see jaxpipe schedule --help)\n")


def test_needs_neither_jax_nor_numpy(folder):
    (folder / "x.json").write_text(to_json(build("1f1b", devices=2, microbatches=2)))
    (folder / "x.csv").write_text(to_csv(build("1f1b", devices=2, microbatches=2)))
    script = """
import sys
from jaxpipe.cli import main
for words in ("--list", "1f1b --devices 2 --microbatches 4 --out y.svg", "--compare all --devices 2 --microbatches 4",
              "--from x.csv --out y.html", "--from x.json --out y.trace.json", "1f2b --devices 2 --microbatches 2"):
    assert main(["schedule", *words.split()]) == (2 if "1f2b" in words else 0)
for name in ("jax", "numpy", "matplotlib"):
    assert name not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_auto_says_why_and_keeps_the_limit(capsys):
    assert main(["schedule", "auto", "--devices", "4", "--microbatches", "8", "--memory", "3", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert max(answer["peak_activations"]) <= 3
    assert answer["name"] in answer["reason"] or answer["name"] == "auto"
    assert main(["schedule", "auto", "--devices", "4", "--microbatches", "8"]) == 0
    assert "\nchosen       interleaved_zb has the smallest makespan" in capsys.readouterr().out


def test_a_memory_limit_without_auto_is_refused(capsys):
    assert main(["schedule", "1f1b", "--devices", "4", "--microbatches", "8", "--memory", "3"]) == 2
    assert "--memory 3 has no effect without auto" in capsys.readouterr().err
