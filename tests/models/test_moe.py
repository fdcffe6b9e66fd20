"""Mixtures of experts against a plain NumPy one, token by token, and the GPT that has them."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import token_loss

from jaxpipe.errors import ConfigError
from jaxpipe.models.build import gpt_logits, gpt_model
from jaxpipe.models.gpt import GPT, GPTConfig, flops_per_token, num_params
from jaxpipe.models.moe import MoE, balance_loss, choose, places, z_loss
from jaxpipe.runtime.measure.arithmetic import dot_flops
from jaxpipe.runtime.sequential import sequential

SWITCH = GPTConfig(vocab_size=17, max_seq_len=8, num_layers=3, num_heads=2, d_model=12, num_experts=4)
MIXTRAL_LIKE = replace(
    SWITCH,
    num_layers=2,
    experts_per_token=2,
    moe_every=1,
    mlp="swiglu",
    bias=False,
    norm="rmsnorm",
    positions="rotary",
    tied=False,
    d_ff=20,
    router_z_weight=0.1,
)
QUICK = {"xla_backend_optimization_level": 0}
CONFIGS = pytest.mark.parametrize("cfg", [SWITCH, MIXTRAL_LIKE], ids=["switch", "mixtral-like"])
TOKENS = jax.random.randint(jax.random.key(1), (4, 9), 0, 17)
BATCH = {"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:]}
X = jax.random.normal(jax.random.key(2), (2, 8, 12))


def make_moe(cfg: GPTConfig, random_like) -> MoE:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MoE(cfg, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, random_like(state))


def numpy_moe(moe: MoE, cfg: GPTConfig, x):
    """Every token on its own, in float64: ``(y, aux)``."""
    p = {path[0]: np.asarray(v.get_value(), np.float64) for path, v in nnx.to_flat_state(nnx.state(moe, nnx.Param))}
    x = np.asarray(x, np.float64)
    num, most = cfg.num_experts, cfg.experts_per_token
    capacity = min(x.shape[1], math.ceil(cfg.capacity_factor * most * x.shape[1] / num))

    def expert(e, token):
        def linear(x, name):
            return x @ p[name][e] + (p[f"{name}_bias"][e] if cfg.bias else 0)

        h = linear(token, "fc")
        if cfg.mlp == "gelu":
            h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        else:
            gate = linear(token, "gate")
            h = gate / (1 + np.exp(-gate)) * h
        return linear(h, "proj")

    y, chosen, mean, z, dropped = np.zeros_like(x), np.zeros(num), np.zeros(num), 0.0, 0
    for b, row in enumerate(x):
        taken = np.zeros(num, int)
        for t, token in enumerate(row):
            logits = token @ p["router"]
            probs = np.exp(logits) / np.exp(logits).sum()
            best = np.argsort(-probs)[:most]
            for e in best:
                if taken[e] < capacity:
                    y[b, t] += expert(e, token) * probs[e] / (probs[best].sum() if most > 1 else 1)
                else:
                    dropped += 1
                taken[e] += 1
            chosen[best] += 1
            mean += probs
            z += math.log(np.exp(logits).sum()) ** 2
    tokens = x.shape[0] * x.shape[1]
    balance = num * (chosen / (tokens * most) @ (mean / tokens))
    loss = cfg.aux_loss_weight * balance + cfg.router_z_weight * z / tokens
    drop_rate = dropped / (tokens * most)
    return y, {"loss": loss, "balance_loss": balance, "z_loss": z / tokens, "drop_rate": drop_rate}


@CONFIGS
@pytest.mark.parametrize("factor", [0.5, 1.25, 4.0])
def test_the_mixture_equals_one_in_numpy(cfg, factor, random_like):
    cfg = replace(cfg, capacity_factor=factor)
    moe = make_moe(cfg, random_like)
    y, aux = nnx.jit(lambda moe, x: moe(x))(moe, X)
    expected_y, expected = numpy_moe(moe, cfg, X)
    np.testing.assert_allclose(y, expected_y, rtol=1e-4, atol=1e-5)
    assert aux.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(aux[name], expected[name], rtol=1e-5)
    assert expected["drop_rate"] == 0 if factor == 4.0 else factor > 1 or expected["drop_rate"] > 0


def test_float64_is_float64_throughout(random_like):
    with jax.enable_x64(True):
        cfg = replace(MIXTRAL_LIKE, dtype="float64", param_dtype="float64")
        moe, x = make_moe(cfg, random_like), X.astype("float64")
        y, aux = nnx.jit(lambda moe, x: moe(x))(moe, x)
        expected_y, expected = numpy_moe(moe, cfg, x)
        np.testing.assert_allclose(y, expected_y, rtol=1e-12, atol=1e-12)
        for name in expected:
            np.testing.assert_allclose(aux[name], expected[name], rtol=1e-12)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_one_expert_is_the_dense_mlp(mlp, random_gpt):
    cfg = replace(SWITCH, num_layers=1, moe_every=1, num_experts=1, mlp=mlp)
    moe, dense = random_gpt(cfg), random_gpt(replace(cfg, num_experts=0))
    for name in ("fc", "gate", "proj") if mlp == "swiglu" else ("fc", "proj"):
        layer = getattr(dense.blocks[0].mlp, name)
        getattr(moe.blocks[0].mlp, name)[...] = layer.kernel[...][None]
        getattr(moe.blocks[0].mlp, f"{name}_bias")[...] = layer.bias[...][None]
    for name in ("embed", "head"):
        nnx.update(getattr(moe, name), nnx.state(getattr(dense, name)))
    for name in ("attn", "norm1", "norm2"):
        nnx.update(getattr(moe.blocks[0], name), nnx.state(getattr(dense.blocks[0], name)))
    run = nnx.jit(lambda gpt: gpt.logits_and_aux(BATCH["tokens"]))
    (logits, aux), (expected, none) = run(moe), run(dense)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert (aux, none) == (pytest.approx(cfg.aux_loss_weight), 0)


def test_places_are_given_in_the_order_of_tokens_and_run_out():
    experts = jnp.array([[[0, 1], [1, 0], [1, 2], [1, 0]], [[2, 1], [2, 0], [2, 1], [0, 1]]])
    full = 6  # 3 experts of 2 places
    expected = [[[0, 2], [3, 1], [full, 4], [full, full]], [[4, 2], [5, 0], [full, 3], [1, full]]]
    np.testing.assert_array_equal(places(experts, num_experts=3, capacity=2), expected)


def test_an_even_load_costs_one_and_a_collapsed_one_costs_e():
    even, collapsed = jnp.zeros((1, 4, 4)), jnp.zeros((1, 4, 4)).at[..., 2].set(100.0)
    np.testing.assert_allclose(balance_loss(even, jnp.arange(4)[None, :, None]), 1)
    np.testing.assert_allclose(balance_loss(collapsed, choose(jax.nn.softmax(collapsed), 1)[1]), 4)
    np.testing.assert_allclose(z_loss(even), math.log(4) ** 2, rtol=1e-6)


def test_the_balance_loss_pushes_probability_off_the_fullest_expert():
    logits, experts = jnp.zeros((1, 4, 4)), jnp.array([0, 0, 0, 1])[None, :, None]
    grad = jax.grad(balance_loss)(logits, experts)[0, 0]
    assert grad[0] > grad[1] > grad[2] == grad[3]


@CONFIGS
def test_a_later_token_does_not_change_earlier_logits_even_where_places_run_out(cfg, random_gpt):
    gpt = random_gpt(replace(cfg, capacity_factor=0.5))
    logits = nnx.jit(lambda gpt, tokens: gpt(tokens))
    before = logits(gpt, BATCH["tokens"])
    for at in range(1, 8):
        after = logits(gpt, jnp.where(jnp.arange(8)[None] == at, (BATCH["tokens"] + 1) % 17, BATCH["tokens"]))
        np.testing.assert_array_equal(before[:, :at], after[:, :at])
        assert (jnp.abs(before - after).max((0, 2))[at:] > 0).any()


def canonical_of(gpt: GPT, cfg: GPTConfig):
    """The parameters of a GPT module as a canonical tree."""
    embed, head, *blocks = (nnx.to_pure_dict(nnx.state(part, nnx.Param)) for part in (gpt.embed, gpt.head, *gpt.blocks))
    stacks = {
        kind: jax.tree.map(lambda *x: jnp.stack(x), *(b for b, k in zip(blocks, cfg.kinds, strict=True) if k == kind))
        for kind in dict.fromkeys(cfg.kinds)
    }
    if cfg.tied:
        del head["kernel"]
    return {"embed": embed, "blocks": stacks, "head": head}


@CONFIGS
def test_loss_and_gradients_of_the_oracle_equal_the_modules(cfg, random_gpt):
    gpt = random_gpt(cfg)

    def mean_loss(gpt):
        logits, aux = gpt.logits_and_aux(BATCH["tokens"])
        loss, weight = token_loss(logits, BATCH)
        return loss / weight + aux

    loss, state = nnx.jit(nnx.value_and_grad(mean_loss))(gpt)
    graphdef, _, streams = nnx.split(gpt, nnx.Param, ...)
    expected = canonical_of(nnx.merge(graphdef, state, streams), cfg)
    value, grads = jax.jit(sequential(gpt_model(cfg)).value_and_grad, compiler_options=QUICK)(
        canonical_of(gpt, cfg), BATCH
    )
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    errors = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.abs(b).max(), grads, expected)
    assert max(jax.tree.leaves(errors)) < 2e-5
    assert all(jnp.isfinite(leaf).all() and (leaf != 0).any() for leaf in jax.tree.leaves(grads))


@CONFIGS
def test_logits_equal_the_modules(cfg, random_gpt):
    gpt = random_gpt(cfg)
    logits = jax.jit(gpt_logits, static_argnums=0)(cfg, canonical_of(gpt, cfg), BATCH["tokens"])
    np.testing.assert_allclose(logits, nnx.jit(lambda gpt: gpt(BATCH["tokens"]))(gpt), rtol=1e-5, atol=1e-5)


def test_row_groups_change_the_loss_by_the_auxiliary_part_only(random_gpt):
    for weight in (0.0, 0.5):
        cfg = replace(MIXTRAL_LIKE, num_layers=1, aux_loss_weight=weight, router_z_weight=0.0, capacity_factor=0.5)
        canonical = canonical_of(random_gpt(cfg), cfg)
        one, two = (jax.jit(sequential(gpt_model(cfg), row_groups=n).loss)(canonical, BATCH) for n in (1, 2))
        assert (abs(one - two) > 1e-4) == bool(weight)
        np.testing.assert_allclose(one, two, rtol=1e-6 if not weight else 0.1)


def test_weights_start_like_a_dense_gpts():
    cfg = replace(SWITCH, d_model=64, num_layers=8)
    moe = MoE(cfg, rngs=nnx.Rngs(0))
    for weights, std in ((moe.router, 0.02), (moe.fc, 0.02), (moe.proj, 0.02 / 4)):
        assert weights[...].std() == pytest.approx(std, rel=0.1)
    assert not any(bias is None or bias[...].any() for bias in (moe.fc_bias, moe.proj_bias))


def test_blocks_of_a_kind_are_one_function():
    blocks = gpt_model(SWITCH).blocks
    assert [block.kind for block in blocks] == ["dense", "moe", "dense"] == list(SWITCH.kinds)
    assert blocks[0].apply is blocks[2].apply is not blocks[1].apply
    assert {block.kind for block in gpt_model(replace(SWITCH, num_experts=0)).blocks} == {"block"}
    assert replace(SWITCH, moe_every=3).kinds == ("dense", "dense", "moe")
    assert replace(SWITCH, moe_every=1).kinds == ("moe", "moe", "moe")


def test_bfloat16_experts_keep_their_carry_and_a_float32_router():
    cfg = replace(MIXTRAL_LIKE, dtype="bfloat16")
    block, carry = gpt_model(cfg).blocks[0], jax.ShapeDtypeStruct((2, 8, 12), jnp.bfloat16)
    params = jax.eval_shape(block.init, jax.random.key(0), carry)
    out, aux = jax.eval_shape(block.apply, params, carry, BATCH, jax.random.key(0))
    assert (out.shape, out.dtype) == (carry.shape, carry.dtype)
    assert {(x.shape, str(x.dtype)) for x in aux.values()} == {((), "float32")}
    scores = jax.eval_shape(lambda x: MoE(cfg, rngs=nnx.Rngs(0)).scores(x), carry)
    assert scores.dtype == jnp.float32


@CONFIGS
def test_num_params_counts_the_module(cfg):
    shapes = nnx.state(nnx.eval_shape(lambda: GPT(cfg, rngs=nnx.Rngs(0))), nnx.Param)
    assert num_params(cfg) == sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


@CONFIGS
@pytest.mark.parametrize("seq_len", [8, 4])
def test_flops_per_token_counts_the_matrix_products(cfg, seq_len, random_gpt):
    graphdef, state = nnx.split(random_gpt(cfg))
    tokens = BATCH["tokens"][:, :seq_len]
    counted = dot_flops(lambda state: nnx.merge(graphdef, state)(tokens), state)
    assert flops_per_token(cfg, seq_len) * tokens.size == counted > 0


def test_capacity_is_the_mean_times_the_factor_and_never_above_the_sequence():
    assert SWITCH.expert_capacity(8) == math.ceil(1.25 * 8 / 4)
    assert MIXTRAL_LIKE.expert_capacity(100) == math.ceil(1.25 * 2 * 100 / 4)
    assert replace(SWITCH, capacity_factor=100.0).expert_capacity(8) == 8
    assert replace(SWITCH, capacity_factor=1.1).expert_capacity(40) == 11
    assert replace(SWITCH, capacity_factor=1e-3).expert_capacity(8) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_experts": -1}, "num_experts=-1 must be at least 0; try 0"),
        ({"experts_per_token": 0}, "experts_per_token=0 must be at least 1; try 1"),
        ({"experts_per_token": 5}, "experts_per_token=5 must not exceed num_experts=4; try 4"),
        ({"moe_every": 0}, "moe_every=0 must be at least 1; try 1"),
        ({"moe_every": 5}, "moe_every=5 must not exceed num_layers=3, or no block has the num_experts=4; try 3"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0 must be above 0; try 1.25"),
        ({"aux_loss_weight": -0.1}, "aux_loss_weight=-0.1 must be at least 0; try 0.0"),
        ({"router_z_weight": math.nan}, "router_z_weight=nan must be finite; try 1.0"),
    ],
)
def test_a_wrong_config_says_the_rule_the_value_and_a_choice(wrong, message):
    with pytest.raises(ConfigError) as error:
        replace(SWITCH, **wrong)
    assert str(error.value) == message
