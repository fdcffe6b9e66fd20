"""Whole runs, small ones: what they compute, what they write, and how they end."""

import json
import os
import re
import signal
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from jaxpipe.errors import ConfigError, PartitionError, ScheduleError
from jaxpipe.models.build import gpt_model
from jaxpipe.runtime.sequential import sequential
from jaxpipe.terminal import Silent
from jaxpipe.train import NonFiniteError, load, train
from jaxpipe.train.assemble import Assembly, assemble
from jaxpipe.train.optim import adamw

TEXT = b"".join(b"%d squared is %d.\n" % (i, i * i) for i in range(400))
CONFIG = """
[model]
num_layers = 4
num_heads = 2
d_model = 16
bias = false

[data]
source = "text"
train = ["{folder}/*.txt"]

[mesh]
pipe = 2

[schedule]
repeats = 2
microbatches = 4

[optim]
learning_rate = 1e-2
warmup_steps = 2

[train]
steps = 6
batch_size = 8
seq_len = 16
eval_every = 4
eval_batches = 2
log_every = 1
out = "{folder}/run"

[checkpoint]
enabled = false
"""

SMALLEST = ("model.num_layers=1", "mesh.pipe=1", "schedule.repeats=1")
"""Overrides for what does not depend on the pipeline: the quickest run to compile."""


def configs_in(folder: Path):
    """Makes runs of 6 steps on 2 devices from overrides; data and output are in the folder."""
    (folder / "squares.txt").write_bytes(TEXT)
    (folder / "small.toml").write_text(CONFIG.format(folder=folder))
    return lambda *overrides: load(folder / "small.toml", overrides)


@pytest.fixture
def config(tmp_path):
    """A run of 6 steps on 2 devices, changed by overrides."""
    return configs_in(tmp_path)


def metrics(result) -> list[dict]:
    return [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]


def losses(result) -> list[float]:
    return [line["loss"] for line in metrics(result) if "loss" in line]


class Raises(Silent):
    """Sends this process a signal once the given step is done."""

    def __init__(self, step: int, number: int):
        self.step, self.number = step, number

    def progress(self, step, steps, values):
        if step == self.step:
            os.kill(os.getpid(), self.number)


def test_a_run_learns_and_writes_everything(config):
    run = config("sample.length=20", "sample.prompt=12 ", "train.steps=30")
    result = train(run)
    assert (result.step, result.stopped_by) == (30, None)
    lines = metrics(result)
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 4, 8, 12, 16, 20, 24, 28, 30]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 31))
    assert lines[0]["val_loss"] == pytest.approx(np.log(256), rel=0.05)
    assert result.val_loss == lines[-1]["val_loss"] < 0.75 * lines[0]["val_loss"]
    assert load(result.out / "config.toml") == run
    assert (result.out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert ET.parse(result.out / "schedule.svg").getroot().tag.endswith("svg")
    assert result.sample is not None
    assert result.sample.startswith("12 ")
    assert all(letter.isprintable() or letter in "\n\t" for letter in result.sample)
    assert (result.out / "sample.txt").read_text() == result.sample


@pytest.mark.parametrize(
    "overrides",
    [
        ("schedule.repeats=2",),
        ("model.num_layers=2", "schedule.repeats=1", "schedule.name=gpipe", "schedule.remat=none", "mesh.data=2"),
    ],
    ids=["interleaved", "gpipe-data2"],
)
def test_a_run_equals_the_unpipelined_model(config, overrides):
    """Same initial weights, data, dropout and updates, computed with no pipeline and plain optax."""
    run = config("model.dropout=0.1", *overrides)
    pipelined = losses(train(run))

    parts = assemble(run)
    model = sequential(gpt_model(run.model), row_groups=4 * run.mesh.data)
    init_key, dropout_key, _ = jax.random.split(jax.random.key(run.train.seed), 3)
    params = jax.jit(model.init)(init_key, parts.train[0])
    tx = adamw(run.optim, steps=run.train.steps)
    state = jax.jit(tx.init)(params)

    @jax.jit
    def train_step(params, state, batch, key):
        loss, grads = model.value_and_grad(params, batch, key)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    for step, loss in enumerate(pipelined):
        key = jax.random.fold_in(dropout_key, step)
        params, state, want = train_step(params, state, parts.train[step], key)
        assert loss == pytest.approx(float(want), rel=2e-5)


def test_reading_metrics_a_step_late_changes_nothing(config, monkeypatch):
    at_once = train(config(*SMALLEST, "train.log_every=2"))
    monkeypatch.setattr(Assembly, "on_cpu", False)
    late = train(config(*SMALLEST, "train.log_every=2", f"train.out={at_once.out}-late"))
    assert losses(late) == losses(at_once)
    assert [line["step"] for line in metrics(late)] == [line["step"] for line in metrics(at_once)]


def test_any_optimizer_and_model_can_be_passed(config):
    run = config(*SMALLEST, "train.steps=3")
    result = train(run, model=gpt_model(replace(run.model, num_layers=2)), optimizer=optax.sgd(0.0))
    before, *_, after = [line["val_loss"] for line in metrics(result) if "val_loss" in line]
    assert before == after
    assert "lr" not in metrics(result)[1]


def test_the_config_s_sampler_is_not_run_on_another_model(config):
    run = config("sample.length=3")
    with pytest.raises(ConfigError, match=r"sample\.length=3 needs the config's own model"):
        train(run, model=gpt_model(run.model))


def test_a_signal_ends_the_run_after_the_step(config):
    result = train(config(*SMALLEST, "sample.length=5"), report=Raises(2, signal.SIGTERM))
    assert (result.step, result.stopped_by, result.sample) == (2, "SIGTERM", None)
    assert len(losses(result)) == 2
    assert (result.out / "loss.png").exists()


def test_a_loss_that_is_not_finite_stops_the_run(config):
    run = config(*SMALLEST, "optim.learning_rate=1e30", "optim.clip_norm=0")
    with pytest.raises(NonFiniteError, match=r"(loss|grad_norm) is (nan|inf) at step \d; last good: step \d, loss \d"):
        train(run)
    with pytest.raises(ConfigError, match="already holds a run"):
        train(config())


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["mesh.pipe=16", "model.num_layers=32"], ConfigError, r"needs 16 devices but there are 8.*mesh\.simulate=16"),
        (["mesh.simulate=16"], ConfigError, r"mesh\.simulate=16 must be set before JAX starts"),
        (["model.num_layers=6"], PartitionError, r"6.*(4|8)"),
        (["schedule.stages=[2,2]"], PartitionError, r"stages=\[2, 2\] must hold one .*; try \[1, 1, 1, 1\]"),
        (["schedule.stages=[1,1,1,2]"], PartitionError, r"stages=\[1, 1, 1, 2\] hold 5 blocks .*; try \[1, 1, 1, 1\]"),
        (["schedule.stages=Et|tt|tL"], PartitionError, r"has 3 stages but the schedule has 4; try 'Et|t|t|tL'"),
        (["schedule.remat=none,full"], ConfigError, r"remat=\['none', 'full'\] must hold one value for each of 4"),
        (["schedule.name=zb_v", "schedule.scan_blocks=true"], ScheduleError, r"scan_blocks=True cannot split"),
        (["schedule.name=1f2b"], ScheduleError, r"1f1b"),
        (["schedule.name=inference"], ScheduleError, r"'inference' must have a backward to train with"),
        (["schedule.name=1f1b"], ScheduleError, r"repeats"),
    ],
)
def test_nothing_is_written_when_the_run_cannot_start(config, overrides, error, message):
    run = config(*overrides)
    with pytest.raises(error, match=message):
        train(run)
    assert not os.path.exists(run.train.out)


def test_the_attention_that_is_taken_is_said(config):
    assert re.search(r"\nattention  xla: \d+ x \d+ scores are few, and no", assemble(config()).describe())
    assert "\nattention  blockwise: asked for\n" in assemble(config("model.attention=blockwise")).describe()


def test_an_axis_without_effect_is_told_of(config):
    assert "model.sequence_parallel=true has no effect" in assemble(config("model.sequence_parallel=true")).describe()
    assert 'mesh.shard="optimizer" has no effect' in assemble(config("mesh.shard=optimizer")).describe()
    assert "warning" not in assemble(config()).describe()


def test_a_run_over_all_axes_learns_the_same(config, tmp_path):
    """Two row groups per step, on two devices and on eight."""
    sizes = ["mesh.fsdp=2", "mesh.tensor=2", "model.sequence_parallel=true", "schedule.microbatches=1"]
    sizes.append(f"train.out={tmp_path / 'many'}")
    few, many = (train(config(*overrides)) for overrides in (["schedule.microbatches=2"], sizes))
    assert losses(many) == pytest.approx(losses(few), rel=1e-4)


OPTIONS = {
    "numbers and scan": ("schedule.stages=[1,2,1,0]", "schedule.scan_blocks=true"),
    "layout, remat per stage, loss scale": (
        "schedule.stages=E|tt|t|tL",
        "schedule.remat=full,none,all,full",
        "train.loss_scale=1024",
    ),
    "head and idle": ("schedule.head=vocab_parallel", "schedule.idle=mask"),
}
TWO_STEPS = ("train.steps=2", "train.eval_every=0", "train.eval_batches=1")


@pytest.fixture(scope="module")
def default_losses(tmp_path_factory):
    """The losses of two steps with the default options."""
    return losses(train(configs_in(tmp_path_factory.mktemp("default"))(*TWO_STEPS)))


@pytest.mark.parametrize("overrides", OPTIONS.values(), ids=OPTIONS)
def test_options_of_the_pipeline_change_no_number(config, default_losses, overrides):
    run = config(*TWO_STEPS, *overrides)
    result = train(run)
    assert load(result.out / "config.toml") == run
    assert losses(result) == pytest.approx(default_losses, rel=1e-5)


def test_float16_with_a_loss_scale_learns_as_float32_does(config, default_losses):
    result = train(config(*TWO_STEPS, "model.dtype=float16", "train.loss_scale=128"))
    assert losses(result) == pytest.approx(default_losses, rel=1e-3)


def test_uneven_stages_are_shown(config):
    assert "stages Ett||t|tL" in assemble(config("schedule.stages=[2,0,1,1]")).describe()
    assert "stages" not in assemble(config()).describe()


def test_float16_without_a_loss_scale_is_told_of(config):
    half = "model.dtype=float16"
    assert 'train.loss_scale=1.0: with model.dtype="float16"' in assemble(config(half)).describe()
    assert "loss_scale" not in assemble(config(half, "train.loss_scale=128")).describe()
    assert "loss_scale" not in assemble(config("model.dtype=bfloat16")).describe()


def test_simulating_as_many_devices_as_there_are_is_fine(config):
    assert assemble(config("mesh.simulate=2")).pipe.mesh.size == 2


def test_the_shipped_gpt2_config_fits_together(tmp_path):
    """Layers divide, the schedule exists and its ticks can be planned; nothing of that size is compiled here."""
    np.arange(20_000, dtype=np.uint16).tofile(tmp_path / "ids.bin")
    path = Path(__file__).parents[2] / "configs" / "gpt2-124m.toml"
    parts = assemble(load(path, [f"data.train={tmp_path}/ids.bin", "data.val="]))
    assert parts.pipe.mesh.size == 8
    assert parts.train[0]["tokens"].shape == (512, 1024)
