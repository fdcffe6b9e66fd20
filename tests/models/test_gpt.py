"""The GPT against a plain NumPy transformer, published sizes, and the properties that define it."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import turned

from jaxpipe.errors import ConfigError
from jaxpipe.models.gpt import GPT, PRESETS, Block, GPTConfig, Head, flops_per_token, num_params
from jaxpipe.models.layers import Rotary
from jaxpipe.runtime.measure.arithmetic import dot_flops

GPT2 = GPTConfig(vocab_size=17, max_seq_len=8, num_layers=2, num_heads=2, d_model=12)
LLAMA_LIKE = replace(GPT2, positions="rotary", norm="rmsnorm", mlp="swiglu", bias=False, tied=False, d_ff=20)
GROUPED = replace(
    LLAMA_LIKE, num_heads=4, num_kv_heads=2, head_width=6, qk_norm=True, qkv_bias=True, sliding_window=3,
    rotary_factor=8.0, rotary_original_len=24,
)  # fmt: skip
MIXED = replace(GPT2, positions="rotary", norm="layernorm", mlp="swiglu", bias=True, tied=False)
TOKENS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 16]])


def numpy_gpt(weights, cfg: GPTConfig, tokens):
    """The model written down once more, one head and one sequence at a time, in float64."""

    def get(path) -> np.ndarray:
        node = weights
        for name in path.split("."):
            node = node[name]
        return np.asarray(node, np.float64)

    def linear(x, path):
        bias = cfg.has_qkv_bias if path.endswith("qkv") else cfg.bias
        return x @ get(f"{path}.kernel") + (get(f"{path}.bias") if bias else 0)

    def norm(x, path):
        if cfg.norm == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * get(f"{path}.scale")
        return x + get(f"{path}.bias") if cfg.bias and cfg.norm == "layernorm" else x

    def attention(x, path):
        # Columns are (head of keys, its queries | k | v, dim).
        per_head, d, far = cfg.num_heads // cfg.kv_heads, cfg.head_dim, cfg.sliding_window or len(x)
        qkv = linear(x, f"{path}.qkv").reshape(len(x), cfg.kv_heads, per_head + 2, d)
        heads = []
        for head in range(cfg.num_heads):
            own = qkv[:, head // per_head]
            q, k, v = own[:, head % per_head], own[:, -2], own[:, -1]
            if cfg.qk_norm:
                q, k = norm(q, f"{path}.q_norm"), norm(k, f"{path}.k_norm")
            if cfg.positions == "rotary":
                q, k = (turned(y, cfg.rotary_base, stretched if cfg.rotary_factor != 1 else None) for y in (q, k))
            scores = q @ k.T / math.sqrt(d)
            weights = np.exp(scores) * np.tri(len(x)) * (1 - np.tri(len(x), k=-far))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v)
        return linear(np.concatenate(heads, -1), f"{path}.proj")

    def stretched(frequency):
        """Llama 3.1's rule, as its authors' code has it."""
        low, high, length = cfg.rotary_low_freq_factor, cfg.rotary_high_freq_factor, cfg.rotary_original_len
        wavelength = 2 * math.pi / frequency
        if wavelength < length / high:
            return frequency
        if wavelength > length / low:
            return frequency / cfg.rotary_factor
        smooth = (length / wavelength - low) / (high - low)
        return (1 - smooth) * frequency / cfg.rotary_factor + smooth * frequency

    def mlp(x, path):
        h = linear(x, f"{path}.fc")
        if cfg.mlp == "gelu":
            h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        else:
            gate = linear(x, f"{path}.gate")
            h = gate / (1 + np.exp(-gate)) * h
        return linear(h, f"{path}.proj")

    logits = []
    for row in tokens:
        x = get("embed.table")[row]
        if cfg.positions == "learned":
            x = x + get("embed.positions")[: len(row)]
        for layer in range(cfg.num_layers):
            x = x + attention(norm(x, f"blocks.{layer}.norm1"), f"blocks.{layer}.attn")
            x = x + mlp(norm(x, f"blocks.{layer}.norm2"), f"blocks.{layer}.mlp")
        kernel = get("embed.table") if cfg.tied else get("head.kernel")
        logits.append(norm(x, "head.norm") @ kernel.T)
    return np.stack(logits)


@nnx.jit
def logits_of(gpt: GPT, tokens):
    return gpt(jnp.asarray(tokens))


def weights_of(gpt: GPT):
    flat = {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(nnx.state(gpt, nnx.Param))}
    tree: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


@pytest.mark.parametrize("cfg", [GPT2, LLAMA_LIKE, MIXED, GROUPED], ids=["gpt2", "llama-like", "mixed", "grouped"])
def test_logits_equal_a_transformer_in_numpy(cfg, random_gpt):
    gpt = random_gpt(cfg)
    np.testing.assert_allclose(logits_of(gpt, TOKENS), numpy_gpt(weights_of(gpt), cfg, TOKENS), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("cfg", [GPT2, GROUPED], ids=["gpt2", "grouped"])
def test_float64_is_float64_throughout(cfg, random_gpt):
    with jax.enable_x64(True):
        cfg = replace(cfg, dtype="float64", param_dtype="float64")
        gpt = random_gpt(cfg)
        expected = numpy_gpt(weights_of(gpt), cfg, TOKENS)
        np.testing.assert_allclose(logits_of(gpt, TOKENS), expected, rtol=1e-12, atol=1e-12)


def test_a_later_token_does_not_change_earlier_logits(random_gpt):
    for cfg in (GPT2, LLAMA_LIKE):
        gpt = random_gpt(cfg)
        before = logits_of(gpt, TOKENS)
        after = logits_of(gpt, np.where(np.arange(5) == 3, 7, TOKENS))
        np.testing.assert_array_equal(before[:, :3], after[:, :3])
        assert (before[:, 3:] != after[:, 3:]).all()


def test_rotary_scores_depend_on_the_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 6, 3, 8))

    rotate = Rotary()

    @jax.jit
    def scores(shift):
        positions = (jnp.arange(6) + shift)[None]
        return jnp.einsum("bqhd,bkhd->bhqk", rotate(q, positions), rotate(k, positions))

    np.testing.assert_allclose(scores(0), scores(100), atol=1e-4)
    assert jnp.abs(scores(0) - jnp.einsum("bqhd,bkhd->bhqk", q, k)).max() > 0.1
    np.testing.assert_array_equal(rotate(q, jnp.zeros((1, 6), int)), q)


@pytest.mark.parametrize("cfg", [GPT2, LLAMA_LIKE, MIXED, GROUPED, PRESETS["tiny"]])
def test_num_params_counts_the_module(cfg):
    shapes = nnx.state(nnx.eval_shape(lambda: GPT(cfg, rngs=nnx.Rngs(0))), nnx.Param)
    assert num_params(cfg) == sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def test_presets_have_the_published_sizes():
    published = {"gpt2-124m": 124.44, "gpt2-350m": 354.82, "gpt2-774m": 774.03, "gpt2-1.5b": 1557.61}
    assert {name: round(num_params(PRESETS[name]) / 1e6, 2) for name in published} == published


@pytest.mark.parametrize("cfg", [GPT2, LLAMA_LIKE, GROUPED])
def test_flops_per_token_counts_the_matrix_products(cfg, random_gpt):
    gpt = random_gpt(cfg)
    graphdef, state = nnx.split(gpt)
    counted = dot_flops(lambda state: nnx.merge(graphdef, state)(jnp.asarray(TOKENS)), state)
    assert flops_per_token(cfg, TOKENS.shape[1]) * TOKENS.size == counted > 0


def test_weights_start_as_in_gpt2():
    cfg = replace(GPT2, num_layers=8, d_model=128, vocab_size=256)
    block, head = nnx.jit(lambda: (Block(cfg, rngs=nnx.Rngs(0)), Head(cfg, rngs=nnx.Rngs(0))))()
    for kernel, std in [
        (head.kernel, 0.02),
        (block.attn.qkv.kernel, 0.02),
        (block.mlp.fc.kernel, 0.02),
        (block.attn.proj.kernel, 0.02 / 4),
        (block.mlp.proj.kernel, 0.02 / 4),
    ]:
        assert kernel[...].std() == pytest.approx(std, rel=0.05)


def test_a_tied_head_is_the_table(random_gpt):
    tied, untied = random_gpt(GPT2), random_gpt(LLAMA_LIKE)
    assert tied.head.kernel is tied.embed.table and untied.head.kernel is not untied.embed.table
    assert untied.head.kernel.shape == tied.head.kernel.shape == (17, 12)


def test_bfloat16_compute_is_near_float32(random_gpt):
    logits = logits_of(random_gpt(replace(GPT2, dtype="bfloat16")), TOKENS)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, logits_of(random_gpt(GPT2), TOKENS), atol=0.3)


def test_norms_compute_in_float32_under_bfloat16():
    cfg = replace(GPT2, dtype="bfloat16", d_model=512)
    norm = nnx.jit(lambda: Block(cfg, rngs=nnx.Rngs(0)).norm1)()
    x = (100 + jax.random.normal(jax.random.key(0), (1, 1, 512))).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean()) / np.sqrt(exact.var() + cfg.norm_eps)
    y = nnx.jit(lambda norm, x: norm(x))(norm, x)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, exact, atol=1e-4)


def test_dtypes_may_be_given_as_types():
    assert replace(GPT2, dtype=jnp.bfloat16) == replace(GPT2, dtype="bfloat16")  # pyright: ignore[reportArgumentType]


def test_a_token_beyond_the_vocabulary_gives_nan(random_gpt):
    assert jnp.isnan(random_gpt(GPT2).embed(jnp.array([[17]]))).all()


def test_learned_positions_end_and_rotary_ones_do_not(random_gpt):
    tokens = jnp.zeros((1, 9), int)
    with pytest.raises(ConfigError, match=r"sequence length 9 must not exceed max_seq_len=8; try 8"):
        random_gpt(GPT2)(tokens)
    assert logits_of(random_gpt(LLAMA_LIKE), tokens).shape == (1, 9, 17)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"d_model": 100, "num_heads": 8}, "d_model=100 must be divisible by num_heads=8; try 96 or 104"),
        ({"d_model": 4, "num_heads": 8}, "d_model=4 must be divisible by num_heads=8; try 8"),
        (
            {"d_model": 6, "positions": "rotary"},
            "positions='rotary' rotates pairs: d_model/num_heads=6/2=3 must be even; try d_model=8",
        ),
        ({"positions": "rotery"}, "positions='rotery' must be one of 'learned', 'rotary'; try 'rotary'"),
        ({"mlp": "swigl"}, "mlp='swigl' must be one of 'gelu', 'swiglu'; try 'swiglu'"),
        ({"norm": "rms"}, "norm='rms' must be one of 'layernorm', 'rmsnorm'; try 'rmsnorm'"),
        (
            {"dtype": "bf16"},
            "dtype='bf16' must be one of 'float32', 'bfloat16', 'float16', 'float64'; try 'bfloat16'",
        ),
        ({"num_layers": 0}, "num_layers=0 must be at least 1; try 1"),
        ({"num_heads": 0}, "num_heads=0 must be at least 1; try 1"),
        ({"max_seq_len": -1}, "max_seq_len=-1 must be at least 1; try 1"),
        ({"d_ff": 0}, "d_ff=0 must be at least 1; try 48"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1; try 0.1"),
        ({"norm_eps": 0.0}, "norm_eps=0.0 must be above 0; try 1e-05"),
        ({"num_heads": 6, "num_kv_heads": 4}, "num_kv_heads=4 must divide num_heads=6; try 3"),
        ({"num_kv_heads": 0}, "num_kv_heads=0 must be at least 1; try 2"),
        (
            {"positions": "rotary", "head_width": 5},
            "head_width=5 must be even for positions='rotary', which rotates pairs; try 6",
        ),
        ({"sliding_window": 0}, "sliding_window=0 must be at least 1; try 8"),
        ({"rotary_factor": 0.0}, "rotary_factor=0.0 must be above 0; try 1.0"),
        (
            {"rotary_high_freq_factor": 1.0},
            "rotary_high_freq_factor=1.0 must exceed rotary_low_freq_factor=1.0; try 4.0",
        ),
        (
            {"attention": "cudnn"},
            "dtype='float32' must be 'bfloat16' or 'float16' for attention='cudnn'; try attention='auto'",
        ),
    ],
)
def test_a_wrong_config_says_the_rule_the_value_and_a_choice(wrong, message):
    with pytest.raises(ConfigError) as error:
        replace(GPT2, **wrong)
    assert str(error.value) == message


def test_every_suggestion_is_accepted():
    assert replace(GPT2, d_model=96, num_heads=8).head_dim == 12
    assert replace(GPT2, d_model=8, num_heads=8).head_dim == 1
    assert replace(GPT2, d_model=8, positions="rotary").head_dim == 4
    assert replace(GPT2, positions="rotary", head_width=6).head_dim == 6
    assert replace(GPT2, num_heads=6, num_kv_heads=3).kv_heads == 3
    assert replace(GPT2, d_model=64, mlp="swiglu").hidden_dim == 192 and GPT2.hidden_dim == 48
