"""A GPT: pre-norm decoder-only transformer, in Flax NNX.

The three parts `Embed`, `Block` and `Head` are what a pipeline wants; `GPT` puts them together with no pipeline. With
the defaults the model is GPT-2 exactly (Radford et al., 2019) but for one thing: dropout is on the embedding and on the
outputs of attention and MLP, not on attention probabilities.

Shape legend: B rows, T positions, D d_model, H heads, K heads of keys and values, d dims of a head, F hidden dims of
the MLP, V vocabulary; while decoding R rows, C new tokens of each, S positions of the cache.

Decoding: `Embed.step` and `Block.step` take the next C tokens of each row, their positions, and a cache of the keys and
values before them, which they read and never write: `Block.step` returns the new tokens' own for the caller to keep.
Padding stands at a row's end at position -1, and comes out as garbage. Dropout is off, and no expert turns tokens away.

Numbers: parameters are `param_dtype`, matrix products run in `dtype`, each kernel used through one cast. Norms,
softmax, rotation and logits are float32 or wider.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.errors import ConfigError
from jaxpipe.flax_nnx import nnx
from jaxpipe.models.gpt_config import BYTES, GPT2_TOKENS, PRESETS, GPTConfig, flops_per_token, num_params
from jaxpipe.models.layers import Rotary, attend_cached, cut, enter, gather, lay, leave, linear, normal, rms_norm
from jaxpipe.models.moe import MoE
from jaxpipe.ops.attention import attend
from jaxpipe.ops.attention_choice import Requested
from jaxpipe.ops.products import dot_general
from jaxpipe.ops.tensor import tensor_devices

__all__ = [
    "BLOCKS",
    "BYTES",
    "GPT",
    "GPT2_TOKENS",
    "MLP",
    "PRESETS",
    "Attention",
    "Block",
    "Embed",
    "GPTConfig",
    "Head",
    "MoEBlock",
    "cache_shape",
    "flops_per_token",
    "num_params",
]


class Embed(nnx.Module):
    """Tokens to vectors. `table` is [V, D]; `positions`, if learned, [max_seq_len, D]."""

    def __init__(self, cfg: GPTConfig, *, rngs: nnx.Rngs):
        self.dtype, self.param_dtype = cfg.dtype, cfg.param_dtype
        self.table = cut(normal(rngs, (cfg.vocab_size, cfg.d_model), std=cfg.init_std, dtype=cfg.param_dtype), dim=0)
        self.positions = nnx.data(None)
        if cfg.positions == "learned":
            shape = (cfg.max_seq_len, cfg.d_model)
            self.positions = nnx.Param(normal(rngs, shape, std=cfg.init_std, dtype=cfg.param_dtype))
        self.dropout = nnx.Dropout(cfg.dropout, rngs=rngs)

    def __call__(self, tokens_BT):
        """Embeds.

        Args:
            tokens_BT: Integers in [0, V).

        Returns:
            [B, T, D] of the compute dtype; NaN where a token is V or more.

        Raises:
            ConfigError: T exceeds the learned positions.
        """
        # Gather, then cast: repeated tokens add up their gradients in the parameters' dtype.
        return self.finish(jnp.take(self.table[...], tokens_BT, axis=0))

    def finish(self, rows_BTD, positions_BT=None):
        """What follows the look-up: rows of the table -> [B, T, D] of the compute dtype; by default at 0, 1, …, T-1."""
        x_BTD = rows_BTD.astype(jnp.promote_types(self.param_dtype, self.dtype))
        if self.positions is not None:
            table, num_tokens = self.positions[...], rows_BTD.shape[1]
            if num_tokens > len(table):
                longest = len(table)
                raise ConfigError(f"sequence length {num_tokens} must not exceed max_seq_len={longest}; try {longest}")
            x_BTD += table[None, :num_tokens] if positions_BT is None else jnp.take(table, positions_BT, axis=0)
        return self.dropout(x_BTD.astype(self.dtype))

    def step(self, tokens_RC, positions_RC):
        """Embeds the next tokens of each row, [R, C, D]; NaN where a learned position is max_seq_len or more."""
        return self.finish(jnp.take(self.table[...], tokens_RC, axis=0), jnp.maximum(positions_RC, 0))


class Attention(nnx.Module):
    """Causal self-attention.

    `qkv` is one matrix [D, (H+2K)*d] whose columns are ordered (head of keys, its queries | k | v, dim): a contiguous
    run of columns is a run of whole heads, so that tensor parallelism can cut it. GPT-2's own order is
    (q|k|v, head, dim). `proj` is [H*d, D].

    Where `tensor` divides H and not K, columns are cut wherever they fall, and the product's result is gathered: each
    device then has its own queries, and all keys and values.
    """

    def __init__(self, cfg: GPTConfig, *, rngs: nnx.Rngs):
        self.num_heads, self.kv_heads, self.head_dim = cfg.num_heads, cfg.kv_heads, cfg.head_dim
        self.rotary, self.window = rotary(cfg), cfg.sliding_window
        self.implementation: Requested = cfg.attention
        columns, inner = (cfg.num_heads + 2 * cfg.kv_heads) * cfg.head_dim, cfg.num_heads * cfg.head_dim
        self.qkv = _linear(cfg, cfg.d_model, columns, bias=cfg.has_qkv_bias, rngs=rngs)
        self.proj = _linear(cfg, inner, cfg.d_model, residual=True, rngs=rngs)
        self.q_norm = self.k_norm = nnx.data(None)
        if cfg.qk_norm:
            dtypes = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
            self.q_norm, self.k_norm = (rms_norm(cfg.head_dim, eps=cfg.norm_eps, **dtypes, rngs=rngs) for _ in range(2))

    def __call__(self, x_BTD):
        """[B, T, D] -> [B, T, D]."""
        (B, T, _), positions_1T = x_BTD.shape, jnp.arange(x_BTD.shape[1])[None]
        q_BTHd, k_BTKd, v_BTKd = self.heads(x_BTD, positions_1T, cut=True)
        y_BTHd = attend(q_BTHd, k_BTKd, v_BTKd, causal=True, window=self.window, implementation=self.implementation)
        return self.proj(y_BTHd.reshape(B, T, -1))

    def step(self, x_RCD, cache: dict, positions_RC):
        """[R, C, D] -> [R, C, D], and the new tokens' ``{"k", "v"}`` [R, K, C, d], like the cache."""
        (R, C, _) = x_RCD.shape
        q_RCHd, k_RCKd, v_RCKd = self.heads(x_RCD, positions_RC, cut=False)
        new = {"k": k_RCKd.swapaxes(1, 2).astype(cache["k"].dtype), "v": v_RCKd.swapaxes(1, 2).astype(cache["v"].dtype)}
        y_RCHd = attend_cached(q_RCHd, new, cache, positions_RC, window=self.window)
        y_RCHd = y_RCHd if self.is_even() else lay(y_RCHd, None)  # else XLA would lay the cache as `proj` lies
        return self.proj(y_RCHd.reshape(R, C, -1)), new

    def is_even(self) -> bool:
        """Whether each device of `tensor` has heads of keys and values of its own."""
        return self.kv_heads % tensor_devices() == 0

    def heads(self, x_BTD, positions_BT, *, cut: bool):
        """Queries [B, T, H, d], keys and values [B, T, K, d], normed and rotated.

        Args:
            x_BTD: What is projected.
            positions_BT: Integers; B may be 1.
            cut: Whether each device of `tensor` has only its own queries where all have all keys and values.
        """
        B, T, _ = x_BTD.shape
        per_head = self.num_heads // self.kv_heads
        qkv_BTN, even = self.qkv(x_BTD), self.is_even()
        qkv_BTN = qkv_BTN if even else gather(qkv_BTN)
        qkv_BTKGd = qkv_BTN.reshape(B, T, self.kv_heads, per_head + 2, self.head_dim)
        q_BTHd = qkv_BTKGd[..., :per_head, :].reshape(B, T, self.num_heads, self.head_dim)
        k_BTKd, v_BTKd = qkv_BTKGd[..., per_head, :], qkv_BTKGd[..., per_head + 1, :]
        if not even:
            q_BTHd, k_BTKd, v_BTKd = (lay(x, None) for x in (q_BTHd, k_BTKd, v_BTKd))
            q_BTHd = lay(q_BTHd, 2) if cut else q_BTHd
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHd, k_BTKd = self.q_norm(q_BTHd).astype(v_BTKd.dtype), self.k_norm(k_BTKd).astype(v_BTKd.dtype)
        if self.rotary is not None:
            q_BTHd, k_BTKd = (self.rotary(x, positions_BT) for x in (q_BTHd, k_BTKd))
        return q_BTHd, k_BTKd, v_BTKd


class MLP(nnx.Module):
    """`fc`, GELU, `proj`; or SwiGLU (Shazeer, 2020): `fc` gated by SiLU of `gate`, then `proj`."""

    def __init__(self, cfg: GPTConfig, *, rngs: nnx.Rngs):
        self.fc = _linear(cfg, cfg.d_model, cfg.hidden_dim, rngs=rngs)
        self.gate = _linear(cfg, cfg.d_model, cfg.hidden_dim, rngs=rngs) if cfg.mlp == "swiglu" else nnx.data(None)
        self.proj = _linear(cfg, cfg.hidden_dim, cfg.d_model, residual=True, rngs=rngs)

    def __call__(self, x_BTD):
        """[B, T, D] -> [B, T, D]."""
        h_BTF = self.fc(x_BTD)
        h_BTF = jax.nn.gelu(h_BTF, approximate=True) if self.gate is None else jax.nn.silu(self.gate(x_BTD)) * h_BTF
        return self.proj(h_BTF)


class Block(nnx.Module):
    """One pre-norm layer: x + attn(norm(x)), then x + mlp(norm(x))."""

    make_mlp: type[MLP | MoE] = MLP

    def __init__(self, cfg: GPTConfig, *, rngs: nnx.Rngs):
        self.cut = cfg.sequence_parallel
        self.norm1 = _norm(cfg, rngs=rngs)
        self.attn = Attention(cfg, rngs=rngs)
        self.dropout1 = nnx.Dropout(cfg.dropout, rngs=rngs)
        self.norm2 = _norm(cfg, rngs=rngs)
        self.mlp = self.make_mlp(cfg, rngs=rngs)
        self.dropout2 = nnx.Dropout(cfg.dropout, rngs=rngs)

    def __call__(self, x_BTD):
        """[B, T, D] -> [B, T, D], both of the compute dtype."""
        x_BTD = self.attend(x_BTD)
        h_BTD = enter(self.norm2(x_BTD).astype(x_BTD.dtype), self.cut)
        return x_BTD + self.dropout2(leave(self.mlp(h_BTD), self.cut))

    def step(self, x_RCD, cache: dict, positions_RC):
        """The next tokens of each row: [R, C, D], a cache as `cache_shape` says -> [R, C, D] and what is new in it."""
        y_RCD, new = self.attn.step(self.norm1(x_RCD).astype(x_RCD.dtype), cache, positions_RC)
        x_RCD += y_RCD
        return x_RCD + self.feed(self.norm2(x_RCD).astype(x_RCD.dtype)), new

    def feed(self, h_RCD):
        """The MLP while decoding, [R, C, D] -> [R, C, D]."""
        return self.mlp(h_RCD)

    def attend(self, x_BTD):
        """The first half, [B, T, D] -> [B, T, D]."""
        h_BTD = enter(self.norm1(x_BTD).astype(x_BTD.dtype), self.cut)
        return x_BTD + self.dropout1(leave(self.attn(h_BTD), self.cut))


class MoEBlock(Block):
    """A layer whose MLP is a mixture of experts."""

    make_mlp = MoE

    def __call__(self, x_BTD):
        """[B, T, D] -> [B, T, D], both of the compute dtype, and the mixture's auxiliary scalars."""
        x_BTD = self.attend(x_BTD)
        y_BTD, aux = self.mlp(enter(self.norm2(x_BTD).astype(x_BTD.dtype), self.cut))
        return x_BTD + self.dropout2(leave(y_BTD, self.cut)), aux

    def feed(self, h_RCD):
        """The mixture while decoding: every expert has a place for every token."""
        assert isinstance(self.mlp, MoE)
        return self.mlp(h_RCD, capacity=h_RCD.shape[1])[0]


BLOCKS: dict[str, type[Block]] = {"block": Block, "dense": Block, "moe": MoEBlock}
"""The layer of every kind in `GPTConfig.kinds`."""


class Head(nnx.Module):
    """The last norm and the logits. `kernel` is [V, D], tied or not, so that a tie is the same array."""

    def __init__(self, cfg: GPTConfig, *, rngs: nnx.Rngs):
        self.dtype, self.wide_dtype, self.dot_general = cfg.dtype, cfg.wide_dtype, dot_general
        self.norm = _norm(cfg, rngs=rngs)
        self.kernel = cut(normal(rngs, (cfg.vocab_size, cfg.d_model), std=cfg.init_std, dtype=cfg.param_dtype), dim=0)

    def __call__(self, x_BTD):
        """[B, T, D] -> logits [B, T, V], float32 or wider."""
        kernel_VD, features = self.kernel[...].astype(self.dtype), (((2,), (1,)), ((), ()))
        return self.dot_general(self.features(x_BTD), kernel_VD, features, preferred_element_type=self.wide_dtype)

    def features(self, x_BTD):
        """[B, T, D] -> what the kernel is multiplied with, of the compute dtype."""
        return self.norm(x_BTD).astype(self.dtype)


class GPT(nnx.Module):
    """The whole model with no pipeline.

    Example:
        >>> gpt = GPT(PRESETS["tiny"], rngs=nnx.Rngs(0))
        >>> gpt(jnp.zeros((2, 16), int)).shape
        (2, 16, 256)
    """

    def __init__(self, cfg: GPTConfig, *, rngs: nnx.Rngs):
        self.embed = Embed(cfg, rngs=rngs)
        self.blocks = nnx.List([BLOCKS[kind](cfg, rngs=rngs) for kind in cfg.kinds])
        self.head = Head(cfg, rngs=rngs)
        if cfg.tied:
            self.head.kernel = self.embed.table

    def __call__(self, tokens_BT):
        """Integers [B, T] -> logits [B, T, V], float32 or wider."""
        return self.logits_and_aux(tokens_BT)[0]

    def logits_and_aux(self, tokens_BT):
        """Integers [B, T] -> the logits, and the sum of the blocks' auxiliary losses (0 with no experts)."""
        x_BTD, total = self.embed(tokens_BT), 0.0
        for block in self.blocks:
            out = block(x_BTD)
            x_BTD, aux = out if isinstance(block, MoEBlock) else (out, {"loss": 0.0})
            total += aux["loss"]
        return self.head(x_BTD), total


def cache_shape(cfg: GPTConfig, rows: int, length: int, dtype: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
    """What a block keeps of the tokens it has seen: keys, rotated, and values.

    Args:
        cfg: The model.
        rows: R.
        length: S, tokens of a row.
        dtype: By default the compute dtype.

    Returns:
        ``{"k", "v"}``, each [R, K, S, d]: so that each head's lie in a row and products read them as they are.
    """
    shape = jax.ShapeDtypeStruct((rows, cfg.kv_heads, length, cfg.head_dim), jnp.dtype(dtype or cfg.dtype))
    return {"k": shape, "v": shape}


def rotary(cfg: GPTConfig) -> Rotary | None:
    """How a model's queries and keys are rotated, if they are."""
    if cfg.positions != "rotary":
        return None
    return Rotary(
        cfg.rotary_base,
        cfg.rotary_factor,
        cfg.rotary_low_freq_factor,
        cfg.rotary_high_freq_factor,
        cfg.rotary_original_len,
    )


def _linear(
    cfg: GPTConfig, num_in: int, num_out: int, *, residual: bool = False, bias: bool | None = None, rngs: nnx.Rngs
) -> nnx.Linear:
    std = cfg.residual_init_std if residual else cfg.init_std
    dtypes = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
    bias = cfg.bias if bias is None else bias
    return linear(num_in, num_out, std=std, bias=bias, **dtypes, rngs=rngs, rows=residual)


def _norm(cfg: GPTConfig, *, rngs: nnx.Rngs) -> nnx.LayerNorm | nnx.RMSNorm:
    """A norm that computes, and answers, in float32 or wider."""
    if cfg.norm == "rmsnorm":
        return rms_norm(cfg.d_model, eps=cfg.norm_eps, dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
    return nnx.LayerNorm(
        cfg.d_model,
        epsilon=cfg.norm_eps,
        dtype=cfg.wide_dtype,
        param_dtype=jnp.dtype(cfg.param_dtype),
        use_bias=cfg.bias,
        use_fast_variance=False,  # E[x²] - E[x]² cancels where the residual stream has a large mean
        rngs=rngs,
    )
