"""Targets that count nothing, and batches in which nothing counts."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QUICK, toy_batch, toy_pipeline, tree_allclose

import jaxpipe as jp
from jaxpipe.models.build import encdec_model, gpt_model
from jaxpipe.models.encdec import EncDecConfig
from jaxpipe.models.gpt import GPTConfig
from jaxpipe.ops import losses
from jaxpipe.ops.losses import IGNORED
from jaxpipe.runtime.model import look_up
from jaxpipe.schedule import build

WORDS, LENGTH, GROUPS = 13, 6, 4
GPT = GPTConfig(vocab_size=WORDS, max_seq_len=LENGTH, num_layers=2, num_heads=2, d_model=8)
EXPERTS = replace(GPT, num_experts=2, aux_loss_weight=0.1)
ENCDEC = EncDecConfig(
    vocab_size=WORDS, num_encoder_layers=1, num_decoder_layers=1, num_heads=2, d_model=8, head_dim=4, d_ff=16
)

# Name, model, schedule, options of the pipeline, batch shards, tokens at once.
CASES = [
    ("chunked", GPT, {"name": "1f1b"}, {}, 2, 2),
    ("split backwards", GPT, {"name": "zb_h1"}, {"remat": "none"}, 1, None),
    ("vocab_parallel", GPT, {"name": "1f1b"}, {"head": "vocab_parallel"}, 2, 2),
    ("experts", EXPERTS, {"name": "1f1b"}, {}, 1, None),
    ("encoder-decoder", ENCDEC, {"name": "gpipe"}, {"head": "vocab_parallel"}, 1, None),
]


def both(config: Any, schedule: dict, options: dict, shards: int) -> tuple[jp.Pipeline, Any]:
    """The pipeline on two stages, and the model without one."""
    model = gpt_model(config) if isinstance(config, GPTConfig) else encdec_model(config)
    plan = build(**schedule, devices=2, microbatches=GROUPS // shards)
    return jp.Pipeline(model, schedule=plan, mesh=jp.make_mesh(2, data=shards), **options), jp.sequential(model, GROUPS)


def batch_of(targets: np.ndarray, **more: np.ndarray) -> dict[str, np.ndarray]:
    """A batch of either model's kind."""
    tokens = np.random.default_rng(0).integers(0, WORDS, (*targets.shape,), np.int32)
    return {"tokens": tokens, "targets": targets, **more}


@pytest.mark.parametrize(
    ("config", "schedule", "options", "shards", "at_once"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_ignored_targets_are_masked_out_everywhere(monkeypatch, config, schedule, options, shards, at_once):
    """The first half of the rows, all of the first data shard's, and then single tokens; at last all."""
    if at_once:
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once * WORDS)
    pipe, oracle = both(config, schedule, options, shards)
    rng = np.random.default_rng(1)
    targets = rng.integers(0, WORDS, (2 * GROUPS, LENGTH), np.int32)
    keep = rng.random(targets.shape) < 0.6
    keep[:GROUPS] = False
    more = {} if isinstance(config, GPTConfig) else {"encoder_tokens": targets.copy(), "encoder_mask": 0 * targets + 1}
    if more:  # rows of padding alone, as the last batch of an epoch has them
        more["encoder_mask"][:GROUPS] = 0
    params = pipe.init(jax.random.key(0), batch_of(targets, **more))
    step = jax.jit(pipe.value_and_grad, compiler_options=QUICK)
    plain = jax.jit(oracle.value_and_grad, compiler_options=QUICK)
    canonical = pipe.to_canonical(params)

    def without_a_pipeline(targets: np.ndarray, mask: np.ndarray) -> Any:
        return plain(canonical, batch_of(targets, mask=mask.astype(np.float32), **more))

    ignored = np.where(keep, targets, IGNORED)
    expected = without_a_pipeline(targets, keep)
    loss, grads = step(params, batch_of(ignored, **more))
    tree_allclose((loss, pipe.to_canonical(grads)), expected)
    tree_allclose(without_a_pipeline(ignored, keep | True), expected)

    nothing = np.full_like(targets, IGNORED)
    for loss, grads in (step(params, batch_of(nothing, **more)), without_a_pipeline(nothing, keep | True)):
        assert loss == 0
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_only_the_ignored_target_is_forgiven():
    pipe, _ = both(GPT, {"name": "1f1b"}, {}, 1)
    targets = np.zeros((2 * GROUPS, LENGTH), np.int32)
    params = pipe.init(jax.random.key(0), batch_of(targets))
    for wrong, finite in ((IGNORED, True), (-1, False), (-99, False), (WORDS, False)):
        targets[0, 0] = wrong
        assert np.isfinite(pipe.loss(params, batch_of(targets))) == finite
    assert pipe.loss(params, batch_of(np.full_like(targets, IGNORED))) == 0


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int8, np.int16])
def test_ids_of_any_integer_dtype_are_taken(dtype):
    """A vocabulary that the dtype itself could not count."""
    kernel, features, ids = jnp.ones((70_000, 2)), jnp.ones((2, 2)), jnp.asarray([3, 100], dtype)
    loss, weight, _ = jp.linear_cross_entropy(kernel, features, ids)
    assert weight == 2 and np.isfinite(loss)
    assert np.isfinite(look_up(kernel, ids)).all()
    if np.issubdtype(dtype, np.signedinteger):
        assert np.isnan(look_up(kernel, -ids)).all()


def test_a_models_own_loss_is_nothing_where_its_weights_are():
    """Also with a loss scale; and where the weights of some microbatches add up to nothing, the rest is the mean."""
    pipe = toy_pipeline("1f1b", 2, 4, data=2)
    batch = toy_batch(16)
    params = pipe.init(jax.random.key(0), batch)
    oracle = jax.jit(jp.sequential(pipe.model, 8).value_and_grad)
    mask = batch["mask"].copy()
    mask[:8] = 0
    for weights in (mask, mask * 0):
        given = batch | {"mask": weights}
        loss, grads = jax.jit(pipe.value_and_grad)(params, given, loss_scale=jnp.float32(8))
        tree_allclose((loss, pipe.to_canonical(grads)), oracle(pipe.to_canonical(params), given))
    assert loss == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
