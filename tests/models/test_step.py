"""Decoding with a cache against the whole model: the same logits, however a row is cut into chunks."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpipe.models import encdec, gpt
from jaxpipe.models.encdec import EncDecConfig
from jaxpipe.models.gpt import GPTConfig

GPT2 = GPTConfig(vocab_size=17, max_seq_len=12, num_layers=2, num_heads=2, d_model=12)
LLAMA = replace(GPT2, positions="rotary", norm="rmsnorm", mlp="swiglu", bias=False, tied=False)
GROUPED = replace(LLAMA, num_heads=4, num_kv_heads=2, head_width=6, qk_norm=True, sliding_window=4, rotary_factor=8.0)
MIXTURE = replace(GPT2, num_experts=3, experts_per_token=2, capacity_factor=1.5)
T5 = EncDecConfig(
    vocab_size=17, num_encoder_layers=2, num_decoder_layers=2, num_heads=2, d_model=12, head_dim=4, d_ff=16,
    num_buckets=4, max_distance=6,
)  # fmt: skip
TURNED = replace(T5, positions="rotary", mlp="gated-gelu", tied=False)
TOKENS = np.random.default_rng(0).integers(0, 17, (2, 10))
SOURCE, SEEN = TOKENS[:, ::-1][:, :7], np.array([[1] * 7, [1] * 4 + [0] * 3], bool)


def write(cache, new, positions_RC):
    """The cache with new tokens at their positions, row by row."""
    cache = {name: np.array(leaf) for name, leaf in cache.items()}
    for name, leaf in new.items():
        for row, positions in enumerate(np.asarray(positions_RC)):
            for at, position in enumerate(positions):
                if position >= 0:
                    cache[name][row, :, position] = leaf[row, :, at]
    return cache


def decode(model, cfg, blocks, caches, chunks, tokens, dtype=jnp.float32):
    """Logits of every token, from runs of `chunks` tokens; the last run is padded to its neighbours' length."""

    @nnx.jit
    def step(model, blocks, caches, tokens_RC, positions_RC):
        x_RCD, news = model.embed.step(tokens_RC, positions_RC), []
        for block, cache in zip(blocks, caches, strict=True):
            x_RCD, new = block.step(x_RCD, cache, positions_RC)
            news.append(new)
        return model.head((x_RCD, x_RCD) if isinstance(cfg, EncDecConfig) else x_RCD), news

    logits, at = [], 0
    for chunk in chunks:
        width = max(chunk, 2)
        tokens_RC = np.zeros((len(tokens), width), int)
        tokens_RC[:, :chunk] = tokens[:, at : at + chunk]
        positions = np.where(np.arange(width) < chunk, at + np.arange(width), -1)
        positions_RC = np.broadcast_to(positions, tokens_RC.shape).astype(np.int32)
        out, news = step(model, blocks, caches, jnp.asarray(tokens_RC), jnp.asarray(positions_RC))
        caches = [write(cache, new, positions_RC) for cache, new in zip(caches, news, strict=True)]
        logits.append(np.asarray(out)[:, :chunk])
        at += chunk
    return np.concatenate(logits, axis=1)


def garbage(shapes):
    """A cache full of numbers that must not matter."""
    return jax.tree.map(lambda s: np.full(s.shape, 7, s.dtype), shapes)


@pytest.mark.parametrize(
    ("cfg", "chunks"),
    [(GPT2, (4, 4, 1, 1)), (LLAMA, (1,) * 10), (GROUPED, (6, 2, 2)), (MIXTURE, (3, 3, 3, 1))],
    ids=["gpt2", "llama", "grouped", "mixture"],
)
def test_a_gpt_decodes_what_it_computes_as_a_whole(cfg, chunks, random_gpt):
    model = random_gpt(cfg)
    caches = [garbage(gpt.cache_shape(cfg, 2, 12)) for _ in model.blocks]
    whole = nnx.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(TOKENS))
    np.testing.assert_allclose(decode(model, cfg, model.blocks, caches, chunks, TOKENS), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cfg", [T5, TURNED], ids=["t5", "rotary"])
def test_a_decoder_decodes_what_it_computes_as_a_whole(cfg, random_encdec):
    model = random_encdec(cfg)

    @nnx.jit
    def whole(model):
        carry = model.embed(jnp.asarray(SOURCE), jnp.asarray(TOKENS))
        for block in model.encoder:
            carry = block(carry, jnp.asarray(SEEN))
        crosses = [block.cross_cache(carry[0]) for block in model.decoder]
        return model(jnp.asarray(SOURCE), jnp.asarray(TOKENS), jnp.asarray(SEEN)), crosses

    logits, crosses = whole(model)
    shapes = encdec.cache_shape(cfg, 2, 12, 7)
    caches = [garbage(shapes) | {**cross, "memory_mask": SEEN} for cross in crosses]
    assert jax.tree.map(jnp.shape, caches[0]) == jax.tree.map(jnp.shape, shapes)
    found = decode(model, cfg, model.decoder, caches, (1, 5, 4), TOKENS)
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)


def test_a_narrow_cache_is_near_a_wide_one(random_gpt):
    model = random_gpt(LLAMA)
    wide, narrow = (
        decode(model, LLAMA, model.blocks, [garbage(gpt.cache_shape(LLAMA, 2, 12, dtype))] * 2, (5, 5), TOKENS)
        for dtype in (None, "bfloat16")
    )
    assert 0 < np.abs(wide - narrow).max() < 0.1
