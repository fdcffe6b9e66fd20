"""A GPT: pre-norm decoder-only transformer, in Flax NNX.

The three parts `Embed`, `Block` and `Head` are what a pipeline wants; `GPT` puts them together with no pipeline. With
the defaults the model is GPT-2 exactly (Radford et al., 2019) but for one thing: dropout is on the embedding and on the
outputs of attention and MLP, not on attention probabilities.

Shape legend: B rows, T positions, D d_model, H heads, d dims of a head (D = H*d), F hidden dims of the MLP,
V vocabulary.

Numbers: parameters are `param_dtype`, matrix products run in `dtype`, each kernel used through one cast. Norms,
softmax, rotation and logits are float32 or wider.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpipe.errors import ConfigError
from jaxpipe.models.gpt_config import BYTES, GPT2_TOKENS, PRESETS, GPTConfig, flops_per_token, num_params
from jaxpipe.models.layers import attend, cut, enter, leave, linear, normal, rms_norm, rotate
from jaxpipe.models.moe import MoE

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

    def finish(self, rows_BTD):
        """What follows the look-up: rows of the table -> [B, T, D] of the compute dtype."""
        x_BTD = rows_BTD.astype(jnp.promote_types(self.param_dtype, self.dtype))
        if self.positions is not None:
            positions, num_tokens = self.positions[...], rows_BTD.shape[1]
            if num_tokens > len(positions):
                longest = len(positions)
                raise ConfigError(f"sequence length {num_tokens} must not exceed max_seq_len={longest}; try {longest}")
            x_BTD += positions[None, :num_tokens]
        return self.dropout(x_BTD.astype(self.dtype))


class Attention(nnx.Module):
    """Causal self-attention.

    `qkv` is one matrix [D, 3*D] whose columns are ordered (head, q|k|v, dim): a contiguous run of columns is a run of
    whole heads, so that tensor parallelism can cut it. GPT-2's own order is (q|k|v, head, dim).
    """

    def __init__(self, cfg: GPTConfig, *, rngs: nnx.Rngs):
        self.num_heads, self.head_dim = cfg.num_heads, cfg.head_dim
        self.rotary_base = cfg.rotary_base if cfg.positions == "rotary" else None
        self.implementation: Literal["xla", "cudnn"] = cfg.attention
        self.qkv = _linear(cfg, cfg.d_model, 3 * cfg.d_model, rngs=rngs)
        self.proj = _linear(cfg, cfg.d_model, cfg.d_model, residual=True, rngs=rngs)

    def __call__(self, x_BTD):
        """[B, T, D] -> [B, T, D]."""
        B, T, D = x_BTD.shape
        qkv_BTHd = self.qkv(x_BTD).reshape(B, T, self.num_heads, 3, self.head_dim)
        q_BTHd, k_BTHd, v_BTHd = (qkv_BTHd[..., i, :] for i in range(3))
        if self.rotary_base is not None:
            q_BTHd, k_BTHd = (rotate(x, jnp.arange(T), self.rotary_base) for x in (q_BTHd, k_BTHd))
        y_BTHd = attend(q_BTHd, k_BTHd, v_BTHd, causal=True, implementation=self.implementation)
        return self.proj(y_BTHd.reshape(B, T, D))


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

    def attend(self, x_BTD):
        """The first half, [B, T, D] -> [B, T, D]."""
        h_BTD = enter(self.norm1(x_BTD).astype(x_BTD.dtype), self.cut)
        return x_BTD + self.dropout1(leave(self.attn(h_BTD), self.cut))


class MoEBlock(Block):
    """A layer whose MLP is a mixture of experts."""

    make_mlp = MoE

    def __call__(self, x_BTD):
        """[B, T, D] -> [B, T, D], both of the compute dtype, and the mixture's auxiliary loss, a scalar."""
        x_BTD = self.attend(x_BTD)
        y_BTD, aux = self.mlp(enter(self.norm2(x_BTD).astype(x_BTD.dtype), self.cut))
        return x_BTD + self.dropout2(leave(y_BTD, self.cut)), aux


BLOCKS: dict[str, type[Block]] = {"block": Block, "dense": Block, "moe": MoEBlock}
"""The layer of every kind in `GPTConfig.kinds`."""


class Head(nnx.Module):
    """The last norm and the logits. `kernel` is [V, D], tied or not, so that a tie is the same array."""

    def __init__(self, cfg: GPTConfig, *, rngs: nnx.Rngs):
        self.dtype, self.wide_dtype = cfg.dtype, cfg.wide_dtype
        self.norm = _norm(cfg, rngs=rngs)
        self.kernel = cut(normal(rngs, (cfg.vocab_size, cfg.d_model), std=cfg.init_std, dtype=cfg.param_dtype), dim=0)

    def __call__(self, x_BTD):
        """[B, T, D] -> logits [B, T, V], float32 or wider."""
        kernel_VD = self.kernel[...].astype(self.dtype)
        return jnp.einsum("btd,vd->btv", self.features(x_BTD), kernel_VD, preferred_element_type=self.wide_dtype)

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
            x_BTD, aux = out if isinstance(block, MoEBlock) else (out, 0.0)
            total += aux
        return self.head(x_BTD), total


def _linear(cfg: GPTConfig, num_in: int, num_out: int, *, residual: bool = False, rngs: nnx.Rngs) -> nnx.Linear:
    std = cfg.residual_init_std if residual else cfg.init_std
    dtypes = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
    return linear(num_in, num_out, std=std, bias=cfg.bias, **dtypes, rngs=rngs, rows=residual)


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
