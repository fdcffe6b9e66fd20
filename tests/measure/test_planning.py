"""Runs and the planner: shapes are the models' own, bytes are XLA's, `auto` is filled in, wrong input is one line."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

import jaxpipe as jp
from jaxpipe.cli.main import main
from jaxpipe.config.run import from_tables
from jaxpipe.errors import ConfigError
from jaxpipe.measure.bench import num_cores
from jaxpipe.measure.compiled import compiled_costs
from jaxpipe.measure.planning import ask, encdec_shape, gpt_shape, planned, resolve
from jaxpipe.measure.predict import Beside, refuse_open
from jaxpipe.measure.profile import Profile, read_profile
from jaxpipe.models import encdec, gpt
from jaxpipe.models.build import gpt_model
from jaxpipe.plan import Problem, Space, analytic, find_device, report, search
from jaxpipe.plan.device import LINK_FRACTION
from jaxpipe.plan.search import options
from jaxpipe.runtime.measure.sizes import memory_of
from jaxpipe.schedule import build
from jaxpipe.terminal import Silent
from jaxpipe.train import load

CPU = find_device("cpu", cores=2)
TABLES = {
    "model": {"vocab_size": 256, "num_layers": 4, "num_heads": 4, "d_model": 64, "tied": False},
    "mesh": {"pipe": 4, "simulate": 4},
    "schedule": {"microbatches": 8, "name": "1f1b"},
    "train": {"seq_len": 64, "batch_size": 16, "out": "runs/planning"},
}
CONFIG = from_tables(TABLES)


@pytest.fixture(scope="module")
def costs():
    """What XLA says of the config's parts: nothing is run."""
    return compiled_costs(CONFIG, CPU, 2, ("none", "full"))


@pytest.mark.parametrize(
    ("change"),
    [
        {},
        {"mlp": "swiglu", "norm": "rmsnorm", "bias": False, "positions": "rotary"},
        {"tied": True, "num_experts": 4, "experts_per_token": 2},
    ],
)
def test_a_gpt_has_its_own_number_of_parameters_and_operations(change):
    cfg = replace(CONFIG.model, **change)
    shape = gpt_shape(cfg, 64)
    assert shape.params == gpt.num_params(cfg)
    assert shape.flops_per_row == pytest.approx(3 * 64 * gpt.flops_per_token(cfg, 64), rel=1e-2)


@pytest.mark.parametrize(
    ("device", "dtype", "seq_len", "same"),
    [("h100", "bfloat16", 4096, "cudnn"), ("h100", "float32", 4096, "blockwise"), ("cpu", "float32", 512, "xla")],
)
def test_auto_counts_as_the_attention_that_the_device_takes(device, dtype, seq_len, same):
    def seconds(attention: str) -> float:
        # Whatever is asked for counts alike where nothing else is.
        cfg = replace(CONFIG.model, d_model=256, dtype=dtype, attention=attention)
        spec = find_device(device)
        return analytic(gpt_shape(cfg, seq_len, spec.capability), spec, rows=1).blocks["block"].times["full"].forward

    assert seconds("auto") == seconds(same)
    assert (seconds("auto") < seconds("xla")) == (same != "xla")


def test_keys_that_tensor_does_not_divide_count_whole_with_their_collectives():
    def shape(kv_heads: int):
        return gpt_shape(replace(CONFIG.model, num_kv_heads=kv_heads, d_model=256, dtype="bfloat16"), 4096, 9.0)

    device = find_device("h100")
    for kv_heads, gathers in ((1, True), (2, True), (4, False)):
        (attention,) = shape(kv_heads).blocks["block"].attentions
        assert attention.allows(4) and attention.gathers(4) == gathers
        keys = 4096 * kv_heads * 64 / (1 if gathers else 4)
        assert attention.own_projected(4) == 4096 * 256 / 4 + 2 * keys
        asked = ask(replace(CONFIG, model=replace(CONFIG.model, num_kv_heads=kv_heads)), device, 4)
        tensors = {option.tensor for option in options(replace(asked, space=Space(("1f1b",), pipe=(1,))))}
        assert tensors == {1, 2, 4}
    cut, whole = (analytic(shape(n), device, rows=1, tensor=4).blocks["block"] for n in (4, 2))
    lean = replace(device, link_bytes_per_s=1e30, latency_s=0.0)
    cut_lean, whole_lean = (analytic(shape(n), lean, rows=1, tensor=4).blocks["block"] for n in (4, 2))
    size, rate = 4096 * 64 * 2, LINK_FRACTION * device.link_bytes_per_s
    gather = size * (4 + 2 * 2) * 3 / 4 / rate + 2 * device.latency_s
    back = size * 4 * 3 / 4 / rate + 2 * size * 2 * 2 * 3 / 4 / rate + 6 * device.latency_s
    for lane, more in (("forward", gather), ("input", gather + back), ("weight", 0.0)):
        found = [getattr(c.times["none"], lane) for c in (whole, whole_lean, cut, cut_lean)]
        assert (found[0] - found[1]) - (found[2] - found[3]) == pytest.approx(more, rel=1e-6, abs=1e-12)
    assert not shape(4).blocks["block"].attentions[0].allows(8)


def test_a_plan_says_which_attention_it_counts():
    problem = ask(CONFIG, CPU, 4, space=Space(schedules=("1f1b",)))
    answer = search(problem)
    assert "\nattention  xla: 64 x 64 scores are few, and no NVIDIA GPU computes them\n" in report.text(answer)
    assert report.answer_numbers(answer)["attention"] == problem.shape.attention


@pytest.mark.parametrize("name", encdec.PRESETS)
def test_an_encoder_decoder_has_its_own_number_of_parameters(name):
    cfg = encdec.PRESETS[name]
    shape = encdec_shape(cfg, 512, 128)
    assert shape.params == encdec.num_params(cfg)
    device = find_device("a100")
    problem = Problem(shape, device, 2, 8, lambda rows, tensor: analytic(shape, device, rows=rows, tensor=tensor))
    space = Space(schedules=("1f1b",), pipe=(2,), rows=(1,))
    best = search(replace(problem, space=space, memory_bytes=float("inf")), pareto=False).best
    assert best is not None
    assert sum(best.counts) == len(shape.kinds)


def test_formulae_keep_what_the_lanes_keep(costs):
    mine = analytic(gpt_shape(CONFIG.model, 64), CPU, rows=2).blocks["block"]
    theirs = costs.blocks["block"]
    assert mine.params == theirs.params
    assert mine.residual_bytes["none"] == theirs.residual_bytes["none"]
    for remat in ("none", "full"):
        assert mine.weight_residual_bytes[remat] == pytest.approx(theirs.weight_residual_bytes[remat], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "repeats", "remat", "stages"),
    [
        ("1f1b", 1, "none", (1, 3)),
        ("interleaved_1f1b", 2, "full", None),
        ("zb_h1", 1, "full", None),
    ],
)
def test_temporaries_are_within_15_percent_of_what_xla_allots(costs, name, repeats, remat, stages):
    space = Space((name,), (2,), (repeats,), (1,), (1,), (1,), (2,), None, (remat,), counts=stages)
    space = replace(space, split="equal" if stages is None else "any", packing="auto", order="ideal")
    asked = ask(CONFIG, CPU, 2, space=space, costs=lambda rows, tensor: costs)
    plan = search(replace(asked, memory_bytes=float("inf")), pareto=False).best
    assert plan is not None
    schedule = build(name, devices=2, microbatches=8, repeats=repeats)
    mesh = jp.make_mesh(pipe=2)
    pipe = jp.Pipeline(gpt_model(CONFIG.model), schedule=schedule, mesh=mesh, remat=remat, stages=stages)
    tokens = jax.ShapeDtypeStruct((16, 64), jnp.int32, sharding=pipe.batch_sharding)
    batch = {"tokens": tokens, "targets": tokens}
    params = jax.eval_shape(pipe.init, jax.random.key(0), batch)
    placed = jax.tree.map(
        lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), params, pipe.layout.shardings(params)
    )
    compiled = jax.jit(pipe.value_and_grad).lower(placed, batch).compile()
    assert plan.memory.temporary == pytest.approx(memory_of(compiled).temp_size_in_bytes, rel=0.15)


def test_auto_is_filled_in_and_the_rest_stays():
    tables = {**TABLES, "schedule": {"microbatches": 8, "name": "auto", "stages": "auto", "remat": "none"}}
    found = resolve(from_tables(tables), CPU)
    assert found.plan is not None
    assert found.config.schedule.name == found.plan.option.schedule != "auto"
    assert found.config.schedule.stages != "auto"
    assert (found.config.schedule.microbatches, found.config.schedule.remat) == (8, "none")
    assert found.config.mesh == CONFIG.mesh
    stages = from_tables({**TABLES, "schedule": {"microbatches": 8, "name": "1f1b", "stages": "auto"}})
    assert resolve(stages, CPU).config.schedule.name == "1f1b"


def test_a_closed_config_is_predicted_and_not_changed():
    found = resolve(CONFIG, CPU)
    assert found.config is CONFIG
    assert found.plan is not None
    assert found.plan.option.schedule == "1f1b"


def test_models_that_the_planner_cannot_see_are_refused():
    with pytest.raises(ConfigError, match=r"schedule\.name='auto' needs the config's own model"):
        refuse_open(replace(CONFIG, schedule=replace(CONFIG.schedule, name="auto")))


def test_the_measured_step_is_said_once_beside_the_prediction():
    lines = []

    class Notes(Silent):
        def note(self, text):
            lines.append(text)

    beside = Beside(resolve(CONFIG, CPU).plan, Notes())
    for _ in range(20):
        beside.settle()
    assert [line.split()[0] for line in lines] == ["predicted", "measured"]


def test_a_profile_is_written_read_and_held_to_its_model(costs, tmp_path):
    fields = json.loads(json.dumps(dict(gpt_shape(CONFIG.model, 64).fields)))
    costs = replace(costs, alone=1.5)
    made = Profile("cpu", "cpu", 2, fields, {2: costs}, ((1024.0, 1e-4), (4096.0, 2e-4)), 1e10)
    path = tmp_path / "profile.json"
    path.write_text(made.to_json())
    assert read_profile(path) == made
    assert made.hop_s(2560.0) == pytest.approx(1.5e-4)
    assert made.costing(CONFIG, "p")(2, 1).hop_s == made.hop_s(costs.carry_bytes)
    other = replace(CONFIG, model=replace(CONFIG.model, d_model=128, num_layers=4))
    with pytest.raises(ConfigError, match=r"of another model: d_model=64 \(here 128\)"):
        made.costing(other, "p")
    with pytest.raises(ConfigError, match="rows=3 with tensor=1; try jaxpipe profile CONFIG --rows 3"):
        made.costing(CONFIG, "p")(3, 1)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="is not what `jaxpipe profile` writes"):
        read_profile(path)


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.to_toml())
    return str(path)


def test_the_command_writes_a_config_that_runs_take(config_file, tmp_path, capsys):
    out, page, plain = (str(tmp_path / f"plan.{suffix}") for suffix in ("toml", "html", "json"))
    small = [config_file, "--devices", "4", "--device", "h100", "--pipe", "2", "4", "--schedule", "1f1b", "zb_v"]
    assert main(["plan", *small, "--out", out]) == 0
    assert "fastest plans" in capsys.readouterr().out
    written = load(out)
    assert written.mesh.pipe in (2, 4)
    assert written.train.batch_size == 16
    assert main(["plan", *small, "--out", page, "--explain"]) == 0
    assert "what one change would buy" in capsys.readouterr().out
    assert main(["plan", *small, "--out", plain, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "plan.json").read_text())
    assert main(["plan", "--from", str(tmp_path), *small[1:]]) == 0
    assert "fastest plans" in capsys.readouterr().out
    assert planned(CONFIG, resolve(CONFIG, CPU).plan).schedule.name == "1f1b"  # pyright: ignore[reportArgumentType]


def test_a_measured_profile_prices_plans(config_file, tmp_path, capsys):
    """`jaxpipe profile`, read by `jaxpipe plan`."""
    out = str(tmp_path / "profile.json")
    tiny = ["model.num_layers=4", "train.seq_len=16"]
    assert main(["profile", config_file, *tiny, "--remat", "none", "--rounds", "1", "--out", out]) == 0
    said = capsys.readouterr().out
    assert "wrote " in said and "hop " in said
    (costs,) = read_profile(out).costs.values()
    assert costs.source == "measured" and 1.0 <= costs.alone <= num_cores()
    assert ("times as fast as beside others" in said) == (num_cores() > 1)
    lanes = vars(costs.blocks["block"].times["none"])
    assert all(seconds > 0 for seconds in lanes.values()), lanes
    assert main(["plan", config_file, *tiny, "--devices", "4", "--costs", out, "--remat", "none"]) == 0
    assert "fastest plans" in capsys.readouterr().out
    assert main(["profile", config_file, "--rounds", "0"]) == 2
    assert "--rounds 0 must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--devices", "4"], "--device must be given, or --costs"),
        (["--device", "h100"], "--devices must be given"),
        (["--devices", "4", "--device", "h1000x"], "try 'h100'"),
        (["--devices", "0", "--device", "h100"], "--devices 0 must be at least 1"),
        (["--devices", "4", "--device", "h100", "--memory", "80XB"], "try 80GB"),
        (["--devices", "4", "--device", "h100", "--schedule", "1f1c"], "try '1f1b'"),
        (["--devices", "4", "--device", "h100", "--out", "plan.tml"], "try 'plan.toml'"),
        (["--devices", "4", "--device", "h100", "--pin", "3"], "must be BLOCK:STAGE"),
        (["--devices", "4", "--device", "h100", "--memory", "1MB"], "no plan fits 4 h100 devices of 0.001 GB"),
        (["--devices", "4", "--device", "h100", "--batch", "x"], None),
        (["--devices", "4", "--costs", "none.json"], "profile none.json cannot be read"),
    ],
)
def test_wrong_input_is_one_line(config_file, words, says, capsys):
    if says is None:
        with pytest.raises(SystemExit) as stopped:
            main(["plan", config_file, *words])
        assert stopped.value.code == 2
        return
    assert main(["plan", config_file, *words]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_folder_without_a_config_is_refused(tmp_path, capsys):
    deep = tmp_path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    assert main(["plan", "--from", str(deep), "--devices", "6", "--device", "h100"]) == 2
    assert "holds no config.toml" in capsys.readouterr().err
