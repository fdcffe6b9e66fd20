"""Runs with mixtures of experts: one loss for training, validation and `jaxpipe eval`; the rest is told apart."""

import jax
import pytest
from helpers import QUICK
from test_loop import config, metrics  # noqa: F401

from jaxpipe.checkpoint.resume import find
from jaxpipe.checkpoint.store import read_meta
from jaxpipe.models.build import gpt_model
from jaxpipe.runtime.sequential import sequential
from jaxpipe.train import train
from jaxpipe.train.assemble import assemble
from jaxpipe.train.evaluate import evaluate

EXPERTS = (
    "model.num_experts=2",
    "model.experts_per_token=1",
    "model.capacity_factor=0.5",
    "model.moe_every=2",
    "model.num_layers=2",
)
WEIGHTS = ("model.aux_loss_weight=0.5", "model.router_z_weight=0.1")


def test_auxiliary_losses_are_told_apart_from_the_loss(config):  # noqa: F811
    run = config(*EXPERTS, *WEIGHTS, "schedule.repeats=1", "train.steps=2", "checkpoint.enabled=true")
    result = train(run)
    first = next(line for line in metrics(result) if "loss" in line)

    parts = assemble(run)
    oracle = sequential(gpt_model(run.model), row_groups=4)
    canonical = oracle.init(jax.random.split(jax.random.key(run.train.seed), 3)[0], parts.train[0])
    expected = jax.jit(lambda *given: oracle.loss(*given, parts=True), compiler_options=QUICK)(
        canonical, parts.train[0]
    )
    assert first["loss"] == pytest.approx(float(expected.head), rel=1e-5)
    assert first["aux_loss"] == pytest.approx(float(expected.aux), rel=1e-4)
    for name in ("balance_loss", "z_loss", "drop_rate"):
        assert first[name] == pytest.approx(float(expected.means[name]), rel=1e-4)
    # By hand: one of the two layers is a mixture.
    assert first["aux_loss"] == pytest.approx(0.5 * first["balance_loss"] + 0.1 * first["z_loss"], rel=1e-4)
    assert 0 < first["drop_rate"] < 1
    assert expected.total == pytest.approx(expected.head + expected.aux)

    batches = min(run.train.eval_batches, parts.val.num_windows // run.train.batch_size)
    score = evaluate(str(result.out), batches=batches)
    assert score.loss == pytest.approx(result.val_loss, rel=1e-5)
    assert read_meta(find(str(result.out))).val_loss == result.val_loss
