"""Numbers that go wrong: the policies, one by one and in whole runs whose data hold one poisoned window."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpipe as jp
from jaxpipe.checkpoint.store import Store
from jaxpipe.config.sections import HealthConfig
from jaxpipe.data.batches import Batches
from jaxpipe.data.corpus import Segment
from jaxpipe.models.build import gpt_model
from jaxpipe.terminal import Silent
from jaxpipe.train import NonFiniteError, load, train
from jaxpipe.train.health import FEWEST, Health, RollBack
from jaxpipe.train.keeper import Keeper

POISON = 1
"""A byte that makes the loss of its window nan."""
CONFIG = """
[model]
num_layers = 1
num_heads = 1
d_model = 8
bias = false

[data]
source = "text"
train = ["{folder}/train.txt"]
val = ["{folder}/val.txt"]

[mesh]
pipe = 1

[schedule]
name = "1f1b"
microbatches = 1

[train]
steps = 8
batch_size = 4
seq_len = 8
eval_every = 0
eval_batches = 1
log_every = 1
out = "{folder}/run"

[checkpoint]
every_steps = 2
"""


@pytest.fixture
def config(tmp_path):
    """Runs of 8 of an epoch's 16 batches, one of them poisoned."""
    text = b"a" * 130 + bytes([POISON]) + b"a" * 382
    (tmp_path / "train.txt").write_bytes(text)
    (tmp_path / "val.txt").write_bytes(b"a" * 65)
    (tmp_path / "run.toml").write_text(CONFIG.format(folder=tmp_path))
    segment = Segment("train", np.frombuffer(text, np.uint8))

    def bad_step(seed: int) -> int:
        batches = Batches([segment], batch_size=4, seq_len=8, vocab_size=256, seed=seed)
        return next(n + 1 for n in range(16) if (batches[n]["targets"] == POISON).any())

    seed = next(seed for seed in range(100) if bad_step(seed) == 5)
    return lambda *overrides: load(tmp_path / "run.toml", [f"train.seed={seed}", *overrides])


class Notes(Silent):
    """Remembers what it is told."""

    def __init__(self):
        self.texts: list[str] = []

    def note(self, text):
        self.texts.append(text)


def poisoned(config):
    model = gpt_model(config.model)
    head = model.head_loss

    def apply(params, carry, mb, key):
        loss, weight = head.apply(params, carry, mb, key)[:2]
        return jnp.where((mb["targets"] == POISON).any(), jnp.nan, loss), weight

    return replace(model, head_loss=jp.HeadLoss(head.init, apply))


def events(result) -> list[tuple[int, str]]:
    lines = [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["event"]) for line in lines if "event" in line]


def losses(result) -> list[int]:
    lines = [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line and "event" not in line]


def test_skip_leaves_the_step_out_and_rollback_its_data(config):
    run = config("health.nonfinite=skip")
    skipped = train(run, model=poisoned(run))
    bad = 5
    assert events(skipped) == [(bad, "skipped")]
    assert skipped.step == 8
    assert losses(skipped) == [step for step in range(1, 9) if step != bad]

    run = config("health.nonfinite=rollback", f"train.out={run.train.out}-back")
    back = train(run, model=poisoned(run))
    ((at, event),) = events(back)
    assert event == "rolled back"
    assert at < bad  # the newest that was on disk
    assert back.step == 8
    assert losses(back) == list(range(1, 9))

    run = config(f"train.out={run.train.out}-stop")
    with pytest.raises(NonFiniteError, match=f"loss is nan at step {bad}; last good: step {bad - 1}"):
        train(run, model=poisoned(run))


def ruinous(step: int, ruin) -> optax.GradientTransformation:
    """An optimizer whose update at a step ruins the weights, and which leaves them alone before."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda leaf: jnp.where(state == step - 1, ruin(leaf), 0.0), updates), state + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


@pytest.fixture
def saves_at_once(monkeypatch):
    """Each save is waited for, so that it is known which of them are made."""
    save = Keeper.save

    def save_and_wait(self, *state):
        save(self, *state)
        self.settled()

    monkeypatch.setattr(Keeper, "save", save_and_wait)


def saving_each_step(config, policy: str):
    """A run that keeps the newest checkpoint alone."""
    saves = ("checkpoint.every_steps=1", "checkpoint.keep=1", "checkpoint.keep_best=0")
    return config(f"data.train={config().data.val[0]}", f"health.nonfinite={policy}", *saves)


@pytest.mark.parametrize("policy", ["skip", "stop", "rollback"])
@pytest.mark.usefixtures("saves_at_once")
def test_a_state_whose_loss_is_not_finite_is_not_saved(config, policy):
    run, told = saving_each_step(config, policy), Notes()
    with pytest.raises(NonFiniteError):
        train(run, optimizer=ruinous(4, lambda leaf: jnp.full_like(leaf, jnp.nan)), report=told)
    assert "the state after step 4 is not saved: its loss is nan" in "".join(told.texts)
    assert max(Store(run.train.out + "/checkpoints").steps()) == 3


@pytest.mark.usefixtures("saves_at_once")
def test_no_checkpoint_is_deleted_for_one_from_which_no_step_is_good(config):
    """Huge weights: their loss is finite and their gradient is not. The run goes back to before them."""
    run, told = saving_each_step(config, "rollback"), Notes()
    with pytest.raises(NonFiniteError, match=r"max_rollbacks=3 are used up"):
        train(run, optimizer=ruinous(4, lambda leaf: 1e30 * leaf), report=told)
    back = [text.split(",")[0] for text in told.texts if text.startswith("rolled")]
    assert back == [f"rolled     back to step {step}" for step in (4, 3, 4)]


def test_no_state_is_saved_at_a_step_that_is_left_out(config):
    run = config("health.nonfinite=skip", "checkpoint.every_steps=5", "checkpoint.keep=9")
    train(run, model=poisoned(run))
    assert Store(run.train.out + "/checkpoints").steps() == [6, 8]  # 5 is left out, and the next one due


def test_a_policy_runs_out():
    skips = Health(HealthConfig(nonfinite="skip", max_skips=2))
    for step in (1, 2):
        assert skips.is_bad(f"loss at step {step}", math.nan, "good")
    with pytest.raises(NonFiniteError, match=r"^loss is nan at step 3; good; health\.max_skips=2 in a row are used up"):
        skips.is_bad("loss at step 3", math.nan, "good")
    back = Health(HealthConfig(nonfinite="rollback", max_rollbacks=1))
    with pytest.raises(RollBack):
        back.is_bad("grad_norm at step 1", math.inf, "good")
    with pytest.raises(NonFiniteError, match=r"health\.max_rollbacks=1 are used up"):
        back.is_bad("grad_norm at step 1", math.inf, "good")
    with pytest.raises(NonFiniteError, match="validation loss is nan at step 4"):
        skips.is_bad("validation loss at step 4", math.nan, "good")


def test_good_steps_in_between_are_no_row_of_bad_ones():
    health = Health(HealthConfig(nonfinite="skip", max_skips=1))
    for _ in range(3):
        assert health.is_bad("loss at step 1", math.nan, "good")
        health.spike({"loss": 1.0})
    assert health.skipped == 3


def test_a_loss_that_jumps_is_a_spike():
    health = Health(HealthConfig(spike=6.0))
    falling = [5.0 - 0.01 * n for n in range(FEWEST + 20)]
    assert [health.spike({"loss": loss}) for loss in falling] == [None] * len(falling)
    assert health.spike({"loss": 9.0}) == pytest.approx(sum(falling) / len(falling))
    assert Health(HealthConfig(spike=0.0)).spike({"loss": 9.0}) is None
