"""The encoder-decoder against a plain NumPy T5, published sizes, and the properties that define it."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import token_loss, turned

from jaxpipe.errors import ConfigError
from jaxpipe.models.build import encdec_model
from jaxpipe.models.encdec import PRESETS, DecoderBlock, EncDec, EncDecConfig, Head, num_params, shared
from jaxpipe.models.relative import relative_buckets
from jaxpipe.runtime.layout.tree import untie
from jaxpipe.runtime.sequential import sequential

T5 = EncDecConfig(
    vocab_size=17,
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_heads=2,
    d_model=12,
    head_dim=4,
    d_ff=20,
    num_buckets=8,
    max_distance=10,
)
SHORT = replace(T5, num_encoder_layers=1, num_decoder_layers=1)
T5_11 = replace(SHORT, mlp="gated-gelu", tied=False)
ROTARY = replace(SHORT, positions="rotary")
QUICK = {"xla_backend_optimization_level": 0}
CONFIGS = pytest.mark.parametrize("cfg", [T5, T5_11, ROTARY], ids=["t5", "t5-1.1", "rotary"])
SOURCE, TARGET = np.random.default_rng(0).integers(0, 17, (2, 4, 7))
MASK = np.arange(7)[None] < np.array([7, 3, 5, 1])[:, None]
BATCH = {
    "encoder_tokens": SOURCE,
    "encoder_mask": MASK,
    "tokens": TARGET[:, :5],
    "targets": TARGET[:, 1:6],
    "mask": np.arange(5)[None] < np.array([5, 2, 3, 4])[:, None],
}


def numpy_encdec(model: EncDec, cfg: EncDecConfig, source, target, mask):
    """T5 written down once more, one head and one sequence at a time, in float64; padding is cut off, not masked."""

    def get(param) -> np.ndarray:
        return np.asarray(param[...], np.float64)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * get(scale)

    def attention(attn, x, memory, bias=None, causal=False):
        q = (x @ get(attn.q.kernel)).reshape(len(x), cfg.num_heads, -1)
        kv = (memory @ get(attn.kv.kernel)).reshape(len(memory), cfg.num_heads, 2, -1)
        out = []
        for head in range(cfg.num_heads):
            q_h, k_h, v_h = q[:, head], kv[:, head, 0], kv[:, head, 1]
            if cfg.positions == "rotary" and bias is not None:
                q_h, k_h = turned(q_h, cfg.rotary_base), turned(k_h, cfg.rotary_base)
            scores = q_h @ k_h.T / (1 if cfg.positions == "relative" else math.sqrt(cfg.head_dim))
            if cfg.positions == "relative" and bias is not None:
                distances = np.arange(len(memory))[None] - np.arange(len(x))[:, None]
                sizes = {"num_buckets": cfg.num_buckets, "max_distance": cfg.max_distance}
                scores = scores + get(bias.table)[relative_buckets(distances, bidirectional=not causal, **sizes), head]
            weights = np.exp(scores) * (np.tri(len(x)) if causal else 1)
            out.append(weights / weights.sum(-1, keepdims=True) @ v_h)
        return np.concatenate(out, -1) @ get(attn.proj.kernel)

    def mlp(module, x):
        h = x @ get(module.fc.kernel)
        if cfg.mlp == "relu":
            h = np.maximum(h, 0)
        else:
            g = x @ get(module.gate.kernel)
            h = 0.5 * g * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * h
        return h @ get(module.proj.kernel)

    logits, embed = [], model.embed
    there = 0 if cfg.positions == "rotary" else None
    for source_row, target_row, mask_row in zip(source, target, mask, strict=True):
        x, y = (get(embed.table)[row] for row in (source_row[mask_row], target_row))
        for block in model.encoder:
            h = norm(x, block.norm1.scale)
            x = x + attention(block.attn, h, h, embed.encoder_bias if there is None else there)
            x = x + mlp(block.mlp, norm(x, block.norm2.scale))
        memory = norm(x, embed.memory_norm.scale)  # once
        for block in model.decoder:
            h = norm(y, block.norm1.scale)
            y = y + attention(block.attn, h, h, embed.decoder_bias if there is None else there, causal=True)
            y = y + attention(block.cross, norm(y, block.norm2.scale), memory)
            y = y + mlp(block.mlp, norm(y, block.norm3.scale))
        y = norm(y, model.head.norm.scale)
        logits.append(y @ get(embed.table).T * cfg.d_model**-0.5 if cfg.tied else y @ get(model.head.kernel).T)
    return np.stack(logits)


@nnx.jit
def logits_of(model: EncDec, source, target, mask=None):
    return model(jnp.asarray(source), jnp.asarray(target), mask)


def canonical_of(model: EncDec, cfg: EncDecConfig) -> dict:
    """The parameters of an `EncDec` as a canonical tree; what is shared is held by the embedding."""

    def own(module, user: str) -> dict:
        params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
        return untie(params, {to.removeprefix(user): "" for to in shared(cfg) if to.startswith(user)})

    def stack(kind: str, blocks) -> dict:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(own(block, f"blocks/{kind}/") for block in blocks))

    stacks = {"encoder": stack("encoder", model.encoder), "decoder": stack("decoder", model.decoder)}
    return {"embed": own(model.embed, "embed/"), "blocks": stacks, "head": own(model.head, "head/")}


@CONFIGS
def test_logits_equal_a_t5_in_numpy(cfg, random_encdec):
    model = random_encdec(cfg)
    expected = numpy_encdec(model, cfg, SOURCE, TARGET, MASK)
    np.testing.assert_allclose(logits_of(model, SOURCE, TARGET, MASK), expected, rtol=1e-4, atol=1e-4)


def test_float64_is_float64_throughout(random_encdec):
    with jax.enable_x64(True):
        cfg = replace(T5, dtype="float64", param_dtype="float64")
        model = random_encdec(cfg)
        expected = numpy_encdec(model, cfg, SOURCE, TARGET, MASK)
        np.testing.assert_allclose(logits_of(model, SOURCE, TARGET, MASK), expected, rtol=1e-12, atol=1e-12)


@CONFIGS
def test_loss_and_gradients_of_the_oracle_equal_the_modules(cfg, random_encdec):
    model = random_encdec(cfg)

    def mean_loss(model):
        loss, weight = token_loss(model(SOURCE, BATCH["tokens"], MASK), BATCH)
        return loss / weight

    loss, state = nnx.jit(nnx.value_and_grad(mean_loss))(model)
    graphdef, _, streams = nnx.split(model, nnx.Param, ...)
    expected = canonical_of(nnx.merge(graphdef, state, streams), cfg)
    canonical = canonical_of(model, cfg)
    value, grads = jax.jit(sequential(encdec_model(cfg), row_groups=2).value_and_grad, compiler_options=QUICK)(
        canonical, BATCH
    )
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    errors = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.abs(b).max(), grads, expected)
    assert max(jax.tree.leaves(errors)) < 2e-5
    assert all(jnp.isfinite(leaf).all() and (leaf != 0).any() for leaf in jax.tree.leaves(grads))


@CONFIGS
def test_the_oracle_starts_with_what_is_shared_in_the_embedding_only(cfg):
    canonical = jax.eval_shape(sequential(encdec_model(cfg)).init, jax.random.key(0), BATCH)
    expected = jax.eval_shape(lambda: canonical_of(EncDec(cfg, rngs=nnx.Rngs(0)), cfg))
    assert jax.tree.map(jnp.shape, canonical) == jax.tree.map(jnp.shape, expected)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(canonical)) == num_params(cfg)
    assert encdec_model(cfg).tie == shared(cfg)


def test_the_encoders_last_norm_is_one_array_for_all(random_encdec):
    model = random_encdec(T5)
    assert all(block.memory_norm.scale is model.embed.memory_norm.scale for block in model.decoder)
    assert all(block.bias.table is model.embed.encoder_bias.table for block in model.encoder)
    assert all(block.bias.table is model.embed.decoder_bias.table for block in model.decoder)
    assert model.head.kernel is model.embed.table


@CONFIGS
def test_a_later_token_of_the_decoder_does_not_change_earlier_logits(cfg, random_encdec):
    model = random_encdec(cfg)
    before = logits_of(model, SOURCE, TARGET, MASK)
    after = logits_of(model, SOURCE, np.where(np.arange(7) == 3, (TARGET + 1) % 17, TARGET), MASK)
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (jnp.abs(before - after).max((0, 2))[3:] > 0).all()


@CONFIGS
def test_padding_has_no_influence(cfg, random_encdec):
    model = random_encdec(cfg)
    before = logits_of(model, SOURCE, TARGET, MASK)
    np.testing.assert_array_equal(before, logits_of(model, np.where(MASK, SOURCE, 16 - SOURCE), TARGET, MASK))
    whole = logits_of(model, SOURCE, TARGET)
    np.testing.assert_allclose(before[0], whole[0], atol=1e-5)
    assert jnp.abs(before - whole)[1:].max() > 1e-3


@CONFIGS
def test_every_encoder_token_reaches_every_logit(cfg, random_encdec):
    model = random_encdec(cfg)
    before = logits_of(model, SOURCE, TARGET)
    for at in (0, 6):
        after = logits_of(model, np.where(np.arange(7) == at, (SOURCE + 1) % 17, SOURCE), TARGET)
        assert (jnp.abs(before - after).max(-1) > 0).all()


def test_a_row_of_padding_only_is_finite(random_encdec):
    assert jnp.isfinite(logits_of(random_encdec(T5), SOURCE, TARGET, np.zeros_like(MASK))).all()


def test_dropout_is_a_function_of_the_key_and_off_without_one(random_encdec):
    canonical = canonical_of(random_encdec(SHORT), SHORT)
    dropping, plain = (sequential(encdec_model(replace(SHORT, dropout=rate))) for rate in (0.5, 0.0))
    loss = jax.jit(dropping.loss)
    one, again, other = (loss(canonical, BATCH, jax.random.key(i)) for i in (1, 1, 2))
    assert jnp.isfinite(one) and one == again != other
    np.testing.assert_allclose(loss(canonical, BATCH), jax.jit(plain.loss)(canonical, BATCH), rtol=1e-6)


def test_bfloat16_blocks_keep_their_carry():
    model = encdec_model(replace(T5, dtype="bfloat16", dropout=0.1))
    key = jax.random.key(0)
    embed = jax.eval_shape(model.embed.init, key, BATCH)
    carry = jax.eval_shape(model.embed.apply, embed, BATCH, key)
    assert [(x.shape, x.dtype) for x in carry] == [((4, 7, 12), jnp.bfloat16), ((4, 5, 12), jnp.bfloat16)]
    for block in (model.blocks[0], model.blocks[-1]):
        params = jax.eval_shape(block.init, key, carry)
        assert jax.eval_shape(block.apply, params, carry, BATCH, key) == carry
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_presets_have_the_published_sizes():
    published = {
        "t5-small": 60506624,
        "t5-base": 222903552,
        "t5-large": 737668096,
        "t5-3b": 2851598336,
        "t5-11b": 11307321344,
        "t5-1.1-small": 76961152,
        "t5-1.1-base": 247577856,
        "t5-1.1-large": 783150080,
        "t5-1.1-xl": 2849757184,
        "t5-1.1-xxl": 11135332352,
    }
    assert {name: num_params(PRESETS[name]) for name in published} == published


def test_weights_start_as_in_t5():
    cfg = replace(T5, vocab_size=256, d_model=64, head_dim=32, num_heads=4, d_ff=256)
    block, head = nnx.jit(lambda: (DecoderBlock(cfg, rngs=nnx.Rngs(0)), Head(cfg, rngs=nnx.Rngs(0))))()
    for kernel, std in [
        (block.cross.q.kernel, (64 * 32) ** -0.5),
        (block.attn.kv.kernel, 64**-0.5),
        (block.attn.proj.kernel, 128**-0.5),
        (block.mlp.fc.kernel, 64**-0.5),
        (block.mlp.proj.kernel, 256**-0.5),
        (head.kernel, 1.0),
    ]:
        assert kernel[...].std() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_encoder_layers": 0}, "num_encoder_layers=0 must be at least 1; try 1"),
        ({"head_dim": 0}, "head_dim=0 must be at least 1; try 1"),
        ({"mlp": "gelu"}, "mlp='gelu' must be one of 'relu', 'gated-gelu'; try 'relu'"),
        (
            {"positions": "rotary", "head_dim": 3},
            "head_dim=3 must be even for positions='rotary', which rotates pairs; try 4",
        ),
        ({"num_buckets": 30}, "num_buckets=30 must be divisible by 4; try 28"),
        ({"num_buckets": 2}, "num_buckets=2 must be divisible by 4; try 4"),
        ({"max_distance": 4}, "max_distance=4 must exceed num_buckets/2=4; try 32"),
        ({"dropout": -0.1}, "dropout=-0.1 must be at least 0 and below 1; try 0.1"),
        ({"norm_eps": 0.0}, "norm_eps=0.0 must be above 0; try 1e-06"),
        (
            {"dtype": "float16"},
            "dtype='float16' must be one of 'float32', 'bfloat16', 'float64'; try 'bfloat16'",
        ),
    ],
)
def test_a_wrong_config_says_the_rule_the_value_and_a_choice(wrong, message):
    with pytest.raises(ConfigError) as error:
        replace(T5, **wrong)
    assert str(error.value) == message
