"""The GPT as a pipeline sees it: plain functions over plain dicts, equal to the module in loss, gradient and logits."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import token_loss

from jaxpipe.models.build import gpt_logits, gpt_model
from jaxpipe.models.gpt import GPT, PRESETS, GPTConfig
from jaxpipe.runtime.sequential import sequential

TIED = GPTConfig(vocab_size=17, max_seq_len=8, num_layers=2, num_heads=2, d_model=12)
UNTIED = replace(TIED, positions="rotary", norm="rmsnorm", mlp="swiglu", bias=False, tied=False)
CONFIGS = pytest.mark.parametrize("cfg", [TIED, UNTIED], ids=["tied", "untied"])
TOKENS = jax.random.randint(jax.random.key(1), (4, 9), 0, 17)
BATCH = {"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:]}


def canonical_of(gpt: GPT, cfg: GPTConfig):
    """The parameters of a GPT module as a canonical tree."""
    embed, head, *blocks = (pure(part) for part in (gpt.embed, gpt.head, *gpt.blocks))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    if cfg.tied:
        del head["kernel"]
    return {"embed": embed, "blocks": {"block": stacked}, "head": head}


def pure(module) -> dict:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


@CONFIGS
def test_logits_equal_the_modules(cfg, random_gpt):
    gpt = random_gpt(cfg)
    canonical = canonical_of(gpt, cfg)
    logits = jax.jit(gpt_logits, static_argnums=0)(cfg, canonical, BATCH["tokens"])
    assert logits.shape == (4, 8, 17) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, nnx.jit(lambda gpt: gpt(BATCH["tokens"]))(gpt), rtol=1e-5, atol=1e-5)


@CONFIGS
def test_loss_and_gradients_equal_the_modules(cfg, random_gpt):
    gpt = random_gpt(cfg)
    canonical = canonical_of(gpt, cfg)

    def mean_loss(gpt):
        loss, weight = token_loss(gpt(BATCH["tokens"]), BATCH)
        return loss / weight

    loss, state = nnx.jit(nnx.value_and_grad(mean_loss))(gpt)
    expected = nnx.to_pure_dict(state)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(expected["blocks"][i] for i in range(cfg.num_layers)))
    expected = {"embed": expected["embed"], "blocks": {"block": stacked}, "head": expected["head"]}
    value, grads = jax.jit(sequential(gpt_model(cfg), row_groups=2).value_and_grad)(canonical, BATCH)
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    errors = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.abs(b).max(), grads, expected)
    assert max(jax.tree.leaves(errors)) < 1e-5


@CONFIGS
def test_parameters_are_plain_dicts_that_stack(cfg):
    block, carry = gpt_model(cfg).blocks[0], jnp.zeros((2, 8, 12))
    one = jax.eval_shape(block.init, jax.random.key(0), carry)
    stacked = jax.eval_shape(jax.vmap(lambda key: block.init(key, carry)), jax.random.split(jax.random.key(0), 3))
    assert all(type(node) is dict for node in (one, one["attn"], one["attn"]["qkv"]))
    assert jax.tree.map(lambda leaf: (3, *leaf.shape), one) == jax.tree.map(jnp.shape, stacked)
    assert one["mlp"].keys() == ({"fc", "proj"} if cfg.tied else {"fc", "gate", "proj"})


def test_a_tie_names_leaves_of_equal_shape():
    model = gpt_model(TIED)
    embed = jax.eval_shape(model.embed.init, jax.random.key(0), BATCH)
    head = jax.eval_shape(model.head_loss.init, jax.random.key(0), jnp.zeros((2, 8, 12)), BATCH)
    assert model.tie == {"head/kernel": "embed/table"}
    assert head["kernel"].shape == embed["table"].shape == (17, 12)
    assert gpt_model(UNTIED).tie == {}


def test_layers_start_different_and_the_loss_at_the_entropy_of_a_uniform_guess():
    cfg = replace(PRESETS["tiny"], num_layers=2)
    tokens = jax.random.randint(jax.random.key(0), (2, 33), 0, 256)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    model = gpt_model(cfg)
    canonical = jax.jit(sequential(model).init)(jax.random.key(0), batch)
    kernels = canonical["blocks"]["block"]["attn"]["qkv"]["kernel"]
    assert (kernels[0] != kernels[1]).all()
    loss, weight = token_loss(jax.jit(gpt_logits, static_argnums=0)(cfg, canonical, batch["tokens"]), batch)
    assert loss / weight == pytest.approx(math.log(256), abs=0.1)


@CONFIGS
def test_bfloat16_blocks_keep_their_carry_and_cast_each_weight_once(cfg):
    cfg = replace(cfg, dtype="bfloat16", dropout=0.1)
    model = gpt_model(cfg)
    key = jax.random.key(0)
    embed = jax.eval_shape(model.embed.init, key, BATCH)
    carry = jax.eval_shape(model.embed.apply, embed, BATCH, key)
    params = jax.eval_shape(model.blocks[0].init, key, carry)
    head = jax.eval_shape(model.head_loss.init, key, carry, BATCH)
    out = jax.eval_shape(model.blocks[0].apply, params, carry, BATCH, key)
    assert carry.dtype == jnp.bfloat16 and (out.shape, out.dtype) == (carry.shape, carry.dtype)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    x = jnp.zeros(carry.shape, carry.dtype)
    for weights, apply in (
        (params, lambda p: model.blocks[0].apply(p, x, BATCH, key)),
        (head, lambda p: model.head_loss.apply(p, x, BATCH, key)),
    ):
        for name, consumers in consumers_of(apply, weights).items():
            if "norm" not in name:
                assert consumers == [("convert_element_type", jnp.bfloat16)], name


def consumers_of(apply, params) -> dict[str, list]:
    """For every parameter the equations that read it, with the dtype they make."""
    jaxpr = jax.make_jaxpr(apply)(params).jaxpr
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return {
        name: [(eqn.primitive.name, eqn.outvars[0].aval.dtype) for eqn in jaxpr.eqns if var in eqn.invars]  # pyright: ignore
        for name, var in zip(names, jaxpr.invars, strict=True)
    }


def test_dropout_is_a_function_of_the_key_and_off_without_one(random_like):
    carry = jax.random.normal(jax.random.key(0), (2, 8, 12))
    block, plain = (gpt_model(replace(TIED, dropout=rate)).blocks[0] for rate in (0.5, 0.0))
    params = random_like(jax.eval_shape(block.init, jax.random.key(0), carry))
    run = jax.jit(lambda key: block.apply(params, carry, BATCH, key))
    off = jax.jit(lambda: plain.apply(params, carry, BATCH, None))
    np.testing.assert_array_equal(run(None), off())
    np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
    assert (run(jax.random.key(1)) != run(jax.random.key(2))).any()


def test_the_embedding_drops_elements_at_the_given_rate(random_like):
    embed = gpt_model(replace(TIED, dropout=0.5)).embed
    params = random_like(jax.eval_shape(embed.init, jax.random.key(0), BATCH))
    apply = jax.jit(embed.apply)
    on, off = (np.asarray(apply(params, BATCH, key)) for key in (jax.random.key(1), None))
    np.testing.assert_allclose(on, np.where(on == 0, 0, 2 * off), atol=1e-6)
    assert 0.4 < (on == 0).mean() < 0.6


def test_the_dropouts_of_a_block_are_independent():
    block = gpt_model(replace(TIED, dropout=0.5, d_model=64)).blocks[0]
    carry = jnp.zeros((4, 8, 64))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(block.init, jax.random.key(0), carry))
    params["attn"]["proj"]["bias"] += 1
    params["mlp"]["proj"]["bias"] += 10
    out = np.asarray(jax.jit(block.apply)(params, carry, BATCH, jax.random.key(0)))
    assert set(np.unique(out)) == {0, 2, 20, 22}
    assert abs(np.corrcoef((out % 20 == 2).ravel(), (out >= 20).ravel())[0, 1]) < 0.1


def test_cross_entropy_is_the_masked_sum():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 5)) * 10
    targets = jnp.array([[0, 4, 2], [1, 1, 3]])
    mask = jnp.array([[1.0, 0.5, 0.0], [2.0, 0.0, 1.0]])
    exact = np.asarray(logits, np.float64)
    exact = np.log(np.exp(exact).sum(-1)) - np.take_along_axis(exact, np.asarray(targets)[..., None], -1)[..., 0]
    loss, weight = token_loss(logits, {"targets": targets})
    np.testing.assert_allclose([loss, weight], [exact.sum(), 6], rtol=1e-6)
    loss, weight = token_loss(logits, {"targets": targets, "mask": mask})
    np.testing.assert_allclose([loss, weight], [(exact * mask).sum(), 4.5], rtol=1e-6)
    for dtype in (bool, int):
        whole = mask.astype(dtype)
        loss, weight = token_loss(logits, {"targets": targets, "mask": whole})
        np.testing.assert_allclose([loss, weight], [(exact * whole).sum(), whole.sum()], rtol=1e-6)


def test_cross_entropy_gradient_is_softmax_minus_one_hot():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 5))
    targets = jnp.array([[0, 4, -1], [1, 99, 3]])
    mask = jnp.array([[1, 1, 0], [1, 0, 1]])
    grad = jax.grad(lambda x: token_loss(x, {"targets": targets, "mask": mask})[0])(logits)
    expected = (jax.nn.softmax(logits) - jax.nn.one_hot(targets, 5)) * mask[..., None]
    np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_cross_entropy_of_bfloat16_logits_is_float32():
    logits = (jax.random.normal(jax.random.key(0), (2, 3, 50)) * 5).astype(jnp.bfloat16)
    mb = {"targets": jnp.zeros((2, 3), int)}
    loss, weight = token_loss(logits, mb)
    assert loss.dtype == weight.dtype == jnp.float32
    np.testing.assert_array_equal(loss, token_loss(logits.astype(jnp.float32), mb)[0])


@pytest.mark.parametrize("target", [-1, 5])
def test_a_target_out_of_range_is_loud_unless_masked(target):
    logits, targets = jnp.zeros((1, 2, 5)), jnp.array([[0, target]])
    assert jnp.isnan(token_loss(logits, {"targets": targets})[0])
    loss, weight = token_loss(logits, {"targets": targets, "mask": jnp.array([[1, 0]])})
    np.testing.assert_allclose([loss, weight], [math.log(5), 1], rtol=1e-6)
