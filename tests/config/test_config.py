"""The sections of a config, what they must agree on, and the way to a file and back."""

import dataclasses
import re
from pathlib import Path

import pytest

from jaxpipe.config.run import Config
from jaxpipe.errors import ConfigError
from jaxpipe.measure.planning import resolve
from jaxpipe.models.gpt import GPT2_TOKENS, PRESETS, num_params
from jaxpipe.plan import find_device
from jaxpipe.train import load

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
MODEL = "[model]\nnum_layers = 4\nnum_heads = 2\nd_model = 16\n"


def shipped(path: Path, *overrides) -> Config:
    """A shipped config; where its model is that of a checkpoint, with a model of the same kind."""
    return load(path, ["model.preset=gpt2-124m"] * ("\ninit_from" in path.read_text()) + list(overrides))


def config(tmp_path, *overrides, text=MODEL) -> Config:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return load(path, overrides)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load(path):
    assert shipped(path).train.steps > 0


def test_shipped_configs_are_found():
    names = {"quickstart", "gpt2-124m", "llama-7b-8gpu", "llama3-8b-8gpu", "llama3-70b-64gpu"}
    assert names <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_fit_the_devices_they_are_for(path):
    run = shipped(path)
    device = find_device("cpu", cores=2) if run.mesh.simulate else find_device("h100")
    plan = resolve(run, device).plan
    assert plan is not None
    assert plan.memory.total < 72e9
    mesh = run.mesh
    assert plan.option.schedule == run.schedule.name
    if found := re.search(r"(\d+)gpu", path.stem):
        assert mesh.pipe * mesh.data * mesh.fsdp * mesh.tensor == int(found.group(1))
    if run.data.source == "tokens":
        assert run.model.vocab_size <= 2**16 or run.data.dtype == "uint32"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-7b-8gpu", 6_738_415_616),
        ("llama3-8b-8gpu", 8_030_261_248),
        ("llama3-70b-64gpu", 70_553_706_496),
    ],
)
def test_llamas_have_the_published_number_of_parameters(name, parameters):
    assert num_params(load(next(path for path in CONFIGS if path.stem == name)).model) == parameters


def test_gpt2_config_computes_in_bfloat16_on_float32_weights():
    path = next(path for path in CONFIGS if path.stem == "gpt2-124m")
    run = load(path)
    assert (run.model.dtype, run.model.param_dtype) == ("bfloat16", "float32")
    assert dataclasses.replace(run.model, dtype="float32", vocab_size=GPT2_TOKENS) == PRESETS["gpt2-124m"]
    assert run.mesh.pipe * run.mesh.data * run.mesh.tensor == 8
    assert (run.mesh.simulate, run.data.dtype) == (0, "uint16")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_resolved_config_loads_to_the_same_run(tmp_path, path):
    run = shipped(path, "train.seed=7", "optim.learning_rate=0.00123")
    resolved = tmp_path / "config.toml"
    resolved.write_text(run.to_toml(), encoding="utf-8")
    assert load(resolved) == run


def test_resolved_config_spells_out_every_default(tmp_path):
    text = config(tmp_path).to_toml()
    sections = ("model", "data", "mesh", "schedule", "optim", "train", "sample", "checkpoint", "health", "watchdog")
    for section in (*sections, "metrics"):
        assert f"[{section}]" in text
    assert "eval_every = 100" in text
    assert "vocab_size = 256" in text
    assert "preset" not in text


def test_vocabulary_and_length_follow_the_data(tmp_path):
    run = config(tmp_path, "train.seq_len=64")
    assert (run.model.vocab_size, run.model.max_seq_len) == (256, 64)


def test_a_preset_can_be_varied(tmp_path):
    run = config(tmp_path, "train.seq_len=128", text='[model]\npreset = "tiny"\ndropout = 0.1\n')
    assert run.model == dataclasses.replace(PRESETS["tiny"], dropout=0.1)


def test_a_model_may_have_experts(tmp_path):
    run = config(tmp_path, "model.experts_per_token=2", text=MODEL + "num_experts = 8\ncapacity_factor = 2\n")
    assert run.model.kinds == ("dense", "moe", "dense", "moe")
    assert (run.model.num_experts, run.model.experts_per_token, run.model.capacity_factor) == (8, 2, 2.0)
    assert config(tmp_path, text=run.to_toml()) == run


@pytest.mark.parametrize(
    "overrides",
    [
        ["schedule.stages=[3,4,4,1]"],
        ['schedule.stages="Et*3|(tt|)*2tL"', "schedule.head=vocab_parallel"],
        ["schedule.stages=even", "schedule.remat=none,full", "schedule.idle=mask"],
        ['schedule.remat=["all"]', "schedule.scan_blocks=true", "train.loss_scale=1024", "model.dtype=float16"],
    ],
)
def test_pipeline_options_survive_a_round_trip(tmp_path, overrides):
    run = config(tmp_path, *overrides)
    assert run != config(tmp_path)
    assert config(tmp_path, text=run.to_toml()) == run
    assert config(tmp_path, "schedule.stages=", text=run.to_toml()).schedule.stages == ""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.batch_size=20"], r"train\.batch_size=20 must be divisible by .*=8\*1=8; try 16 or 24"),
        (["train.batch_size=3"], r"train\.batch_size=3 must be divisible by .*=8\*1=8; try 8"),
        (["train.batch_size=24", "mesh.data=2"], r"train\.batch_size=24 must be divisible by .*=8\*2=16; try 16 or 32"),
        (["train.batch_size=24", "mesh.fsdp=2"], r"mesh\.data\*mesh\.fsdp=8\*1\*2=16; try 16 or 32"),
        (["model.max_seq_len=100"], r"train\.seq_len=256 must not exceed model\.max_seq_len=100; try 100"),
        (["model.vocab_size=100"], r"model\.vocab_size=100 must cover all 256 bytes; try 256"),
        (["data.source=text"], r'data\.train=\[\] must name at least one file for data\.source="text"'),
        (["data.train=a.txt"], r'must be empty for data\.source="stdlib"; try data\.source="text"'),
        (["data.val_fraction=1.5"], r"data\.val_fraction=1\.5 must lie between 0 and 1"),
        (["data.source=tokens", "data.train=a.bin"], r"model\.vocab_size must be set; or name a preset: tiny"),
        (
            ["data.source=tokens", "data.train=a.bin", "model.vocab_size=9", "sample.length=5"],
            r"sample\.length=5 needs text.*try sample\.length=0",
        ),
        (["train.steps=0"], r"train\.steps=0 must be at least 1; try 1"),
        (["train.eval_every=-1"], r"train\.eval_every=-1 must be at least 0; try 0"),
        (["mesh.pipe=0"], r"mesh\.pipe=0 must be at least 1"),
        (["schedule.repeats=0"], r"schedule\.repeats=0 must be at least 1"),
        (["schedule.stages=3"], r"schedule\.stages=3 must be a string or a list; try \[3\]"),
        (["schedule.stages=[3,-1]"], r"schedule\.stages=\[3, -1\] must hold numbers of at least 0; try \[3, 0\]"),
        (["schedule.remat=[full]"], r"schedule\.remat='\[full\]' must be one of 'full', 'none', 'all'"),
        (["schedule.scan_blocks=yes"], r"schedule\.scan_blocks='yes' must be true or false"),
        (
            ["schedule.head=vocab"],
            r"schedule\.head='vocab' must be one of 'last', 'vocab_parallel'; try 'vocab_parallel'",
        ),
        (["schedule.idle=wait"], r"schedule\.idle='wait' must be one of 'skip', 'mask'; try"),
        (["train.loss_scale=0"], r"train\.loss_scale=0\.0 must be above 0; try 1\.0"),
        (["model.dtype=float8"], r"^model\.dtype='float8' must be one of .*; try 'float64'"),
        (["model.param_dtype=float16"], r"^model\.param_dtype='float16' must be one of .*; try 'bfloat16'"),
        (["schedule.remat=ful"], r"schedule\.remat='ful' must be one of 'full', 'none', 'all'; try 'full'"),
        (["optim.beta2=1"], r"optim\.beta2=1\.0 must be at least 0 and below 1"),
        (["optim.learning_rate=-1"], r"optim\.learning_rate=-1\.0 must be at least 0"),
        (["optim.eps=0"], r"optim\.eps=0\.0 must be above 0"),
        (["sample.prompt="], r'sample\.prompt="" must hold at least one byte'),
        (["model.preset=gpt2"], r"model\.preset='gpt2' must be one of 'tiny', .*; try 'gpt2-"),
        (["model.d_model=15"], r"^model\.d_model=15 must be divisible by num_heads=2"),
        (["model.dropout=1.0"], r"^model\.dropout=1\.0 must be at least 0 and below 1"),
        (["model.num_experts=2", "model.experts_per_token=3"], r"^model\.experts_per_token=3 must not exceed"),
        (["model.num_experts=2", "model.moe_every=5"], r"^model\.moe_every=5 must not exceed num_layers=4"),
        (["model.layers=3"], r"unknown key model\.layers; did you mean model\.num_layers\?"),
    ],
)
def test_wrong_values_name_the_rule_and_what_would_do(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, *overrides)


def test_a_model_that_leaves_out_its_size_is_told_so(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.num_layers must be set; or name a preset: tiny, small"):
        config(tmp_path, text="")
