"""What is measured, that the limit is one, that a trace misses nothing, and that a clock leaves no mark elsewhere."""

import json
import re
from collections import Counter
from dataclasses import fields, replace
from functools import cache
from itertools import pairwise
from xml.etree import ElementTree

import jax
import pytest
from hlo import computations, hlo_text, holds_product

from jaxpipe.cli.main import main
from jaxpipe.errors import ConfigError, PartitionError, ScheduleError
from jaxpipe.measure.bench import Case, Row, Workload, make_cases, workload_of
from jaxpipe.measure.bench.case import Idle, Remat
from jaxpipe.measure.bench.lanes import lanes_only
from jaxpipe.measure.bench.measure import lockstep_ratio
from jaxpipe.measure.bench.report import trace_text
from jaxpipe.measure.bench.trace import Trace, pipe_mesh, trace
from jaxpipe.models.gpt import GPTConfig
from jaxpipe.runtime.loop.clock import Clock
from jaxpipe.runtime.measure.arithmetic import dot_flops
from jaxpipe.schedule import build, show
from jaxpipe.schedule.rules import reads, writes

SMALL = ["--set", "model.num_layers=2", "model.num_heads=1", "model.d_model=8", "train.seq_len=8"]
TINY = Workload(GPTConfig(vocab_size=17, max_seq_len=8, num_layers=4, num_heads=1, d_model=8, tied=False), 8, 1)


@pytest.fixture(scope="module", autouse=True)
def devices():
    """The 8 devices of all tests exist before a command asks for fewer."""
    assert len(jax.devices()) == 8


def one_case(name: str, devices: int = 2, microbatches: int = 4, remat: Remat = "none", idle: Idle = "skip") -> Case:
    """A case with one block per stage."""
    stages = devices * build(name, devices=devices, microbatches=microbatches).repeats
    workload = replace(TINY, config=replace(TINY.config, num_layers=stages))
    (case,), _ = make_cases(
        workload, schedules=[name], devices=[devices], microbatches=[microbatches], remats=[remat], idles=[idle]
    )
    return case


def program_of(case: Case, mesh=None):
    """The program and its arguments, as shapes."""
    pipe, batch = case.pipeline(mesh), case.workload.batch(case.schedule.microbatches)
    params = jax.eval_shape(pipe.init, jax.eval_shape(lambda: jax.random.key(0)), batch)
    program = pipe.program(params, batch)
    return program, (params, batch)


def test_the_command_prints_every_number_of_every_case(capsys):
    sizes = ["--devices", "2", "--microbatches", "4", "--remat", "none", "--rounds", "1"]
    code = main(["bench", "--schedule", "zb_h1", *sizes, "--json", *SMALL])
    answer = json.loads(capsys.readouterr().out)
    assert code == 0
    assert answer["cores"] >= 1 and answer["left_out"] == []
    assert answer["attention"] == "xla: 8 x 8 scores are few, and no NVIDIA GPU computes them"
    assert [(row["schedule"], row["P"], row["V"], row["M"]) for row in answer["rows"]] == [
        ("zb_h1", 2, 1, 4),
    ]
    for row in answer["rows"]:
        assert set(row) == {field.name for field in fields(Row)}
        numbers = {name: value for name, value in row.items() if not isinstance(value, str)}
        assert all(value > 0 for value in numbers.values()), numbers
        assert row["ratio_to_limit"] == pytest.approx(row["step_s"] / row["limit_s"])
        assert row["arithmetic"] == pytest.approx(1.0)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("name", ["gpipe", "zb_h1", "zb_v", "dualpipe_v"])
def test_the_lanes_alone_do_the_arithmetic_of_every_microbatch(name, remat):
    """T_dev leaves nothing out and does nothing twice, whatever the schedule."""
    case = one_case(name, remat=remat)
    program, known = program_of(case)
    stage = program.stages.stage
    head = jax.eval_shape(program.ends.head, dict(program.ends.shapes))

    def loss(head, carry, mb):
        return program.model.head_loss.apply(head, carry, mb, None)[0]

    both = jax.value_and_grad(loss, (0, 1))
    forward = dot_flops(stage.forward, stage.params, stage.carry, stage.context)
    backward = dot_flops(stage.backward, *stage.backward_shapes)
    microbatch = case.schedule.repeats * (forward + backward) + dot_flops(both, head, stage.carry, stage.context.mb)
    found = dot_flops(lambda *known: lanes_only(program, *known), *known)
    assert found == case.schedule.microbatches * microbatch


def test_the_lanes_alone_compute_every_microbatch_inside_their_loop():
    """A stage whose input is the same for all microbatches would be computed once, before it."""
    sizes = ["model.num_layers=4", "model.d_model=64", "model.num_heads=1", "train.seq_len=32"]  # smaller is not tidied
    schedule = build("interleaved_1f1b", devices=2, microbatches=4, repeats=2)
    program, known = program_of(Case(workload_of(None, sizes), schedule, "none"))
    text = hlo_text(jax.jit(lambda *known: lanes_only(program, *known)).lower(*known).compile())
    parts = computations(text)
    (entry,) = (lines for name, lines in parts.items() if re.search(rf"^ENTRY %?{re.escape(name)}\b", text, re.M))
    loops = [line for line in entry if " while(" in line]
    assert any(holds_product(line, parts) for line in loops)
    assert not [line for line in entry if line not in loops and holds_product(line, parts)]


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_limit_of_1f1b_is_the_published_one(remat):
    assert lockstep_ratio(one_case("1f1b", devices=4, microbatches=16, remat=remat)) == pytest.approx((16 + 3) / 16)


CASES: list[tuple[str, int, Remat, Idle]] = [
    ("1f1b", 2, "none", "mask"),
    ("zb_h1", 3, "none", "skip"),
    ("dualpipe_v", 2, "full", "skip"),
]


@cache
def traced_case(name: str, devices: int, remat: Remat, idle: Idle) -> Trace:
    return trace(one_case(name, devices, remat=remat, idle=idle))


@pytest.mark.parametrize(("name", "devices", "remat", "idle"), CASES)
def test_a_trace_has_every_action_once_and_after_its_inputs(name, devices, remat, idle):
    traced = traced_case(name, devices, remat, idle)
    schedule, busy = traced.schedule, traced.measured.busy
    assert [[span.action for span in row] for row in busy] == [list(order) for order in schedule.order]
    assert Counter(a for row in busy for *_, a in row) == Counter(a for order in schedule.order for a in order)
    for row in busy:
        assert all(start < end for start, end, _ in row)
        assert all(before.end <= after.start for before, after in pairwise(row))
    ready = {value: end for row in busy for _, end, a in row for value in writes(a, schedule.stages)}
    for row in busy:
        for start, _, action in row:
            assert all(ready[value] <= start for value in reads(action, schedule.stages)), action
    assert min(row[0].start for row in busy) == 0
    assert traced.measured.makespan == max(row[-1].end for row in busy)
    assert ("devices share cores" in trace_text(traced)) == (devices > traced.cores)


def test_a_trace_is_drawn_measured_above_simulated(tmp_path, capsys):
    sizes = ["--schedule", "zb_h1", "--devices", "2", "--microbatches", "4"]
    out = tmp_path / "trace.svg"
    assert main(["bench", "--trace", *sizes, "--out", str(out), *SMALL]) == 0
    titles = [text.text for text in ElementTree.fromstring(out.read_text()).iter() if text.get("font-weight") == "bold"]
    assert titles == ["measured: zb_h1 P=2 M=4 V=1 loop", "simulated: zb_h1 P=2 M=4 V=1 loop"]
    printed = capsys.readouterr().out
    for word in ("measured", "simulated", "forward", "input gradient", "weight gradient", f"wrote {out}"):
        assert f"\n{word}" in printed


def test_a_trace_as_a_page_and_for_perfetto():
    lines = traced_case(*CASES[0]).timelines()
    page = show.html(lines)
    assert "measured: 1f1b" in page and "<title>1f1b</title>" in page
    events = json.loads(show.trace(lines))["traceEvents"]
    spans = [event for event in events if event["ph"] == "X" and event["pid"] == 0]
    assert Counter(event["name"] for event in spans) == {
        f"{s}{p}{m}": 1 for s in range(2) for p in "FB" for m in range(4)
    }
    assert max(event["ts"] + event["dur"] for event in spans) == pytest.approx(1000 * lines[0].length)


def test_only_a_program_with_a_clock_calls_the_host():
    case = one_case("zb_h1")
    plain, known = program_of(case, pipe_mesh(2))
    texts = [
        jax.jit(lambda *known, program=program: program(*known, None)).lower(*known).as_text()
        for program in (plain, replace(plain, clock=Clock()))
    ]
    assert ["callback" in text for text in texts] == [False, True]


def test_what_cannot_be_built_is_left_out_and_named():
    shapes = {"devices": [2, 3], "microbatches": [4], "remats": ["full"]}
    cases, left_out = make_cases(TINY, schedules=["1f1b", "zb_v", "interleaved_1f1b"], repeats=[1, 2], **shapes)
    assert [(case.schedule.name, case.schedule.devices, case.schedule.repeats) for case in cases] == [
        ("1f1b", 2, 1),
        ("zb_v", 2, 2),
        ("interleaved_1f1b", 2, 1),
        ("interleaved_1f1b", 2, 2),
    ]
    assert len(left_out) == 4
    assert left_out[0].startswith("1f1b P=3 M=4: num_layers=4 must be a multiple of")


def test_nothing_to_measure_is_an_error():
    shapes = {"microbatches": [4], "remats": ["full"]}
    with pytest.raises(PartitionError, match="num_layers=4 must be a multiple"):
        make_cases(TINY, devices=[3], **shapes)
    with pytest.raises(ScheduleError, match="'inference' has no backward"):
        make_cases(TINY, schedules=["inference"], devices=[2], **shapes)
    with pytest.raises(ConfigError, match=r"did you mean model\.d_model"):
        workload_of(None, ["model.d_mode=3"])


def test_a_config_gives_model_and_microbatch(tmp_path):
    from jaxpipe.train import load

    path = tmp_path / "run.toml"
    path.write_text("[model]\nnum_layers = 2\nnum_heads = 2\nd_model = 16\n[train]\nbatch_size = 24\nseq_len = 8\n")
    workload = workload_of(load(path))
    assert (workload.config.d_model, workload.seq_len, workload.rows) == (16, 8, 3)


BAD = {
    "schedule": (["--schedule", "zb_x"], "schedule='zb_x' is not one of", "try 'zb_v'"),
    "devices": (["--devices", "0"], "--devices 0 must be at least 1", "try 1"),
    "layers": (["--devices", "3"], "num_layers=8 must be a multiple of devices=3", "try num_layers=6 or 9"),
    "key": (["--set", "model.num_layer=2"], "unknown key model.num_layer", "did you mean model.num_layers?"),
    "several": (["--trace", "--remat", "full", "none"], "--trace runs one case but the options make 2", "--remat full"),
    "ending": (["--trace", "--out", "a.pgn"], "--out 'a.pgn' must end in one of", "try 'a.png'"),
    "no trace": (["--out", "a.png"], "--out 'a.png' has no effect without --trace", "try --trace --out a.png"),
    "rounds": (["--trace", "--rounds", "3"], "--rounds 3 has no effect with --trace", "leave it out"),
}


@pytest.mark.parametrize(("arguments", "rule", "choice"), BAD.values(), ids=BAD.keys())
def test_wrong_arguments_exit_2_with_one_line(capsys, arguments, rule, choice):
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"jaxpipe: error: {rule}")
    assert choice in err
    assert len(err.splitlines()) == 1
    assert out == ""
