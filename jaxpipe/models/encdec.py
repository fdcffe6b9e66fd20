"""An encoder-decoder transformer in the form of T5, in Flax NNX.

The parts `Embed`, `EncoderBlock`, `DecoderBlock` and `Head` are what a pipeline wants; `EncDec` puts them together with
no pipeline. With the defaults the model is T5 exactly (Raffel et al., 2020), with ``mlp="gated-gelu", tied=False`` its
version 1.1, but for one thing: dropout is on the embeddings and on the outputs of attention and MLP only.

What flows through the blocks is a pair of streams, encoder [B, S, D] and decoder [B, T, D], both embedded at once.
Encoder blocks change the first. Decoder blocks change the second and read the first, which is the encoder's output
before its last norm: every decoder block norms it anew, all with one scale. Those numbers are T5's, which norms it
once; the price is elementwise work, the gain that no block differs from the others of its kind.

What several blocks share lives in the embedding, once (see `shared`): the tables of relative positions and the scale of
the encoder's last norm.

Shape legend: B rows, S positions of the encoder, T of the decoder, D d_model, H heads, d dims of a head, F hidden dims
of the MLP, V vocabulary. In attention T are queries and S keys. While decoding R rows, C new tokens of each; see
`jaxpipe.models.gpt`.

Numbers: parameters are `param_dtype`, matrix products run in `dtype`, each kernel used through one cast. Norms,
softmax, rotation and logits are float32 or wider.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.flax_nnx import nnx
from jaxpipe.models.encdec_config import BYTES, PRESETS, T5_TOKENS, EncDecConfig, num_params
from jaxpipe.models.layers import Rotary, attend_cached, attend_kept, cut, linear, normal, rms_norm
from jaxpipe.models.relative import RelativeBias
from jaxpipe.ops.attention import attend
from jaxpipe.ops.attention_choice import Requested
from jaxpipe.ops.products import dot_general

__all__ = [
    "BYTES",
    "MLP",
    "PRESETS",
    "T5_TOKENS",
    "Attention",
    "DecoderBlock",
    "Embed",
    "EncDec",
    "EncDecConfig",
    "EncoderBlock",
    "Head",
    "cache_shape",
    "num_params",
    "shared",
]


def shared(cfg: EncDecConfig) -> dict[str, str]:
    """The leaves that live in the embedding, once, by the paths of their users."""
    leaves = {"blocks/decoder/memory_norm/scale": "embed/memory_norm/scale"}
    if cfg.positions == "relative":
        leaves["blocks/encoder/bias/table"] = "embed/encoder_bias/table"
        leaves["blocks/decoder/bias/table"] = "embed/decoder_bias/table"
    if cfg.tied:
        leaves["head/kernel"] = "embed/table"
    return leaves


class Embed(nnx.Module):
    """Tokens of both sides to vectors, by one `table` [V, D]; and the home of what blocks share."""

    def __init__(self, cfg: EncDecConfig, *, rngs: nnx.Rngs):
        self.dtype = cfg.dtype
        self.table = cut(normal(rngs, (cfg.vocab_size, cfg.d_model), std=1.0, dtype=cfg.param_dtype), dim=0)
        self.memory_norm = _norm(cfg, rngs=rngs)
        self.encoder_bias = _bias(cfg, bidirectional=True, rngs=rngs)
        self.decoder_bias = _bias(cfg, bidirectional=False, rngs=rngs)
        self.dropout = nnx.Dropout(cfg.dropout, rngs=rngs)

    def __call__(self, encoder_tokens_BS, tokens_BT):
        """Embeds.

        Args:
            encoder_tokens_BS: Integers in [0, V).
            tokens_BT: The decoder's, likewise.

        Returns:
            The pair of streams [B, S, D], [B, T, D], of the compute dtype; NaN where a token is V or more.
        """
        return self.finish(jnp.take(self.table[...], tokens, axis=0) for tokens in (encoder_tokens_BS, tokens_BT))

    def step(self, tokens_RC, positions_RC):
        """Embeds the decoder's next tokens, [R, C, D]; positions are the blocks' affair."""
        return jnp.take(self.table[...], tokens_RC, axis=0).astype(self.dtype)

    def finish(self, rows):
        """What follows the look-up: rows of the table for both streams -> the pair of the compute dtype."""
        x_BSD, y_BTD = (self.dropout(stream.astype(self.dtype)) for stream in rows)
        return x_BSD, y_BTD


class Attention(nnx.Module):
    """Attention of one stream to itself or to another, linear maps without bias.

    `q` is [D, H*d]; `kv` is [D, H*2*d] with columns ordered (head, k|v, dim), so that tensor parallelism can cut it in
    runs of whole heads; `proj` is [H*d, D].
    """

    def __init__(self, cfg: EncDecConfig, *, causal: bool, rotates: bool, rngs: nnx.Rngs):
        D, inner = cfg.d_model, cfg.num_heads * cfg.head_dim
        self.num_heads, self.head_dim, self.causal = cfg.num_heads, cfg.head_dim, causal
        self.implementation: Requested = cfg.attention
        self.rotary = Rotary(cfg.rotary_base) if rotates else None
        self.scale = 1.0 if cfg.positions == "relative" else cfg.head_dim**-0.5
        query_std = (D * cfg.head_dim) ** -0.5 if cfg.positions == "relative" else D**-0.5
        self.q = _linear(cfg, D, inner, std=query_std, rngs=rngs)
        self.kv = _linear(cfg, D, 2 * inner, std=D**-0.5, rngs=rngs)
        self.proj = _linear(cfg, inner, D, std=inner**-0.5, rngs=rngs, rows=True)

    def __call__(self, x_BTD, memory_BSD, *, distances_LH=None, mask_BS=None):
        """[B, T, D] queries and [B, S, D] keys -> [B, T, D]."""
        B, T, _ = x_BTD.shape
        q_BTHd, (k_BSHd, v_BSHd) = self.queries(x_BTD), self.memory(memory_BSD)
        if self.rotary is not None:
            q_BTHd, k_BSHd = (self.rotary(x, jnp.arange(x.shape[1])[None]) for x in (q_BTHd, k_BSHd))
        y_BTHd = attend(
            q_BTHd,
            k_BSHd,
            v_BSHd,
            causal=self.causal,
            distances_LH=distances_LH,
            seen_BS=None if mask_BS is None else mask_BS.astype(bool),
            scale=self.scale,
            implementation=self.implementation,
        )
        return self.proj(y_BTHd.reshape(B, T, -1))

    def step(self, x_RCD, cache: dict, positions_RC, bias: RelativeBias | None):
        """Self-attention of the next tokens: [R, C, D] -> [R, C, D], and their ``{"k", "v"}``, like the cache."""
        R, C, _ = x_RCD.shape
        q_RCHd, (k_RCHd, v_RCHd) = self.queries(x_RCD), self.memory(x_RCD)
        if self.rotary is not None:
            q_RCHd, k_RCHd = (self.rotary(x, positions_RC) for x in (q_RCHd, k_RCHd))
        new = {"k": k_RCHd.swapaxes(1, 2).astype(cache["k"].dtype), "v": v_RCHd.swapaxes(1, 2).astype(cache["v"].dtype)}
        between = None if bias is None else bias.between
        y_RCHd = attend_cached(q_RCHd, new, cache, positions_RC, bias=between, scale=self.scale)
        return self.proj(y_RCHd.reshape(R, C, -1)), new

    def look(self, x_RCD, k_RHSd, v_RHSd, mask_RS):
        """Attention to keys and values worked out before, [R, C, D] -> [R, C, D]."""
        y_RCHd = attend_kept(self.queries(x_RCD), k_RHSd, v_RHSd, mask_RS, scale=self.scale)
        return self.proj(y_RCHd.reshape(*x_RCD.shape[:2], -1))

    def queries(self, x_BTD):
        """[B, T, D] -> [B, T, H, d], not rotated."""
        return self.q(x_BTD).reshape(*x_BTD.shape[:2], self.num_heads, self.head_dim)

    def memory(self, x_BSD):
        """[B, S, D] -> keys, not rotated, and values, [B, S, H, d]."""
        kv_BSHd = self.kv(x_BSD).reshape(*x_BSD.shape[:2], self.num_heads, 2, self.head_dim)
        return kv_BSHd[..., 0, :], kv_BSHd[..., 1, :]


class MLP(nnx.Module):
    """`fc`, ReLU, `proj`; or `fc` gated by the GELU (tanh approximation) of `gate`, then `proj`. No biases."""

    def __init__(self, cfg: EncDecConfig, *, rngs: nnx.Rngs):
        D, F = cfg.d_model, cfg.d_ff
        self.fc = _linear(cfg, D, F, std=D**-0.5, rngs=rngs)
        self.gate = _linear(cfg, D, F, std=D**-0.5, rngs=rngs) if cfg.mlp == "gated-gelu" else nnx.data(None)
        self.proj = _linear(cfg, F, D, std=F**-0.5, rngs=rngs, rows=True)

    def __call__(self, x_BTD):
        """[B, T, D] -> [B, T, D]."""
        h_BTF = self.fc(x_BTD)
        h_BTF = jax.nn.relu(h_BTF) if self.gate is None else jax.nn.gelu(self.gate(x_BTD), approximate=True) * h_BTF
        return self.proj(h_BTF)


class EncoderBlock(nnx.Module):
    """One pre-norm layer of the encoder: self-attention that sees the whole sequence, then the MLP."""

    def __init__(self, cfg: EncDecConfig, *, rngs: nnx.Rngs):
        self.bias = _bias(cfg, bidirectional=True, rngs=rngs)
        self.norm1 = _norm(cfg, rngs=rngs)
        self.attn = Attention(cfg, causal=False, rotates=cfg.positions == "rotary", rngs=rngs)
        self.norm2 = _norm(cfg, rngs=rngs)
        self.mlp = MLP(cfg, rngs=rngs)
        self.dropout1, self.dropout2 = (nnx.Dropout(cfg.dropout, rngs=rngs) for _ in range(2))

    def __call__(self, carry, mask_BS=None):
        """The pair of streams -> the pair with the first changed; a False in the mask is a key that nobody sees."""
        x_BSD, y_BTD = carry
        bias = None if self.bias is None else self.bias()
        h_BSD = self.norm1(x_BSD).astype(x_BSD.dtype)
        x_BSD += self.dropout1(self.attn(h_BSD, h_BSD, distances_LH=bias, mask_BS=mask_BS))
        x_BSD += self.dropout2(self.mlp(self.norm2(x_BSD).astype(x_BSD.dtype)))
        return x_BSD, y_BTD


class DecoderBlock(nnx.Module):
    """One pre-norm layer of the decoder: causal self-attention, attention to the encoder, then the MLP.

    Attention to the encoder knows no positions: no bias, no rotation, as in T5.
    """

    def __init__(self, cfg: EncDecConfig, *, rngs: nnx.Rngs):
        self.bias = _bias(cfg, bidirectional=False, rngs=rngs)
        self.norm1 = _norm(cfg, rngs=rngs)
        self.attn = Attention(cfg, causal=True, rotates=cfg.positions == "rotary", rngs=rngs)
        self.norm2 = _norm(cfg, rngs=rngs)
        self.memory_norm = _norm(cfg, rngs=rngs)
        self.cross = Attention(cfg, causal=False, rotates=False, rngs=rngs)
        self.norm3 = _norm(cfg, rngs=rngs)
        self.mlp = MLP(cfg, rngs=rngs)
        self.dropout1, self.dropout2, self.dropout3 = (nnx.Dropout(cfg.dropout, rngs=rngs) for _ in range(3))

    def __call__(self, carry, mask_BS=None):
        """The pair of streams -> the pair with the second changed; the mask is the encoder's."""
        x_BSD, y_BTD = carry
        bias = None if self.bias is None else self.bias()
        memory_BSD = self.memory_norm(x_BSD).astype(x_BSD.dtype)
        h_BTD = self.norm1(y_BTD).astype(y_BTD.dtype)
        y_BTD += self.dropout1(self.attn(h_BTD, h_BTD, distances_LH=bias))
        h_BTD = self.norm2(y_BTD).astype(y_BTD.dtype)
        y_BTD += self.dropout2(self.cross(h_BTD, memory_BSD, mask_BS=mask_BS))
        y_BTD += self.dropout3(self.mlp(self.norm3(y_BTD).astype(y_BTD.dtype)))
        return x_BSD, y_BTD

    def cross_cache(self, x_BSD) -> dict[str, jax.Array]:
        """What attention to the encoder's output needs, worked out once: ``{"cross_k", "cross_v"}`` [B, H, S, d]."""
        k_BSHd, v_BSHd = self.cross.memory(self.memory_norm(x_BSD).astype(x_BSD.dtype))
        return {"cross_k": k_BSHd.swapaxes(1, 2), "cross_v": v_BSHd.swapaxes(1, 2)}

    def step(self, y_RCD, cache: dict, positions_RC):
        """The next tokens of each row, [R, C, D], and a cache like `cache_shape` -> [R, C, D], new ``{"k", "v"}``."""
        h_RCD, new = self.attn.step(self.norm1(y_RCD).astype(y_RCD.dtype), cache, positions_RC, self.bias)
        y_RCD += h_RCD
        h_RCD = self.norm2(y_RCD).astype(y_RCD.dtype)
        y_RCD += self.cross.look(h_RCD, cache["cross_k"], cache["cross_v"], cache["memory_mask"])
        return y_RCD + self.mlp(self.norm3(y_RCD).astype(y_RCD.dtype)), new


class Head(nnx.Module):
    """The decoder's last norm and the logits. `kernel` is [V, D], tied or not, so that a tie is the same array."""

    def __init__(self, cfg: EncDecConfig, *, rngs: nnx.Rngs):
        self.dtype, self.wide_dtype, self.dot_general = cfg.dtype, cfg.wide_dtype, dot_general
        self.scale = cfg.d_model**-0.5 if cfg.tied else 1.0
        self.norm = _norm(cfg, rngs=rngs)
        std = 1.0 if cfg.tied else cfg.d_model**-0.5
        self.kernel = cut(normal(rngs, (cfg.vocab_size, cfg.d_model), std=std, dtype=cfg.param_dtype), dim=0)

    def __call__(self, carry):
        """The pair of streams -> logits [B, T, V], float32 or wider."""
        kernel_VD, features = self.kernel[...].astype(self.dtype), (((2,), (1,)), ((), ()))
        return self.dot_general(self.features(carry), kernel_VD, features, preferred_element_type=self.wide_dtype)

    def features(self, carry):
        """The pair of streams -> what the kernel is multiplied with [B, T, D], of the compute dtype."""
        return (self.norm(carry[1]) * self.scale).astype(self.dtype)


class EncDec(nnx.Module):
    """The whole model with no pipeline.

    Example:
        >>> model = EncDec(PRESETS["tiny"], rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((2, 16), int), jnp.zeros((2, 8), int)).shape
        (2, 8, 256)
    """

    def __init__(self, cfg: EncDecConfig, *, rngs: nnx.Rngs):
        self.embed = Embed(cfg, rngs=rngs)
        self.encoder = nnx.List([EncoderBlock(cfg, rngs=rngs) for _ in range(cfg.num_encoder_layers)])
        self.decoder = nnx.List([DecoderBlock(cfg, rngs=rngs) for _ in range(cfg.num_decoder_layers)])
        self.head = Head(cfg, rngs=rngs)
        for block in self.decoder:
            block.memory_norm = self.embed.memory_norm
        for blocks, bias in ((self.encoder, self.embed.encoder_bias), (self.decoder, self.embed.decoder_bias)):
            for block in blocks:
                block.bias = bias
        if cfg.tied:
            self.head.kernel = self.embed.table

    def __call__(self, encoder_tokens_BS, tokens_BT, encoder_mask_BS=None):
        """Integers [B, S] and [B, T], a mask [B, S] that is False at padding -> logits [B, T, V], float32 or wider."""
        carry = self.embed(encoder_tokens_BS, tokens_BT)
        for block in (*self.encoder, *self.decoder):
            carry = block(carry, encoder_mask_BS)
        return self.head(carry)


def cache_shape(
    cfg: EncDecConfig, rows: int, length: int, source_len: int, dtype: Any = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """What a decoder block keeps: of the tokens it has seen, and of the encoder's output.

    Args:
        cfg: The model.
        rows: R.
        length: S, tokens of a row.
        source_len: Tokens of the encoder's side.
        dtype: Of keys and values; by default the compute dtype.

    Returns:
        ``{"k", "v"}`` [R, H, S, d], ``{"cross_k", "cross_v"}`` [R, H, source_len, d] and the bools ``memory_mask``
        [R, source_len], False for a token that nobody may see.
    """
    own, cross = (
        jax.ShapeDtypeStruct((rows, cfg.num_heads, tokens, cfg.head_dim), jnp.dtype(dtype or cfg.dtype))
        for tokens in (length, source_len)
    )
    mask = jax.ShapeDtypeStruct((rows, source_len), jnp.bool_)
    return {"k": own, "v": own, "cross_k": cross, "cross_v": cross, "memory_mask": mask}


def _bias(cfg: EncDecConfig, *, bidirectional: bool, rngs: nnx.Rngs):
    """The table of one stack's self-attention, if positions are relative."""
    if cfg.positions != "relative":
        return nnx.data(None)
    return RelativeBias(
        cfg.num_heads,
        bidirectional=bidirectional,
        num_buckets=cfg.num_buckets,
        max_distance=cfg.max_distance,
        std=cfg.d_model**-0.5,
        param_dtype=cfg.param_dtype,
        rngs=rngs,
    )


def _linear(
    cfg: EncDecConfig, num_in: int, num_out: int, *, std: float, rngs: nnx.Rngs, rows: bool = False
) -> nnx.Linear:
    dtypes = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
    return linear(num_in, num_out, std=std, bias=False, **dtypes, rngs=rngs, rows=rows)


def _norm(cfg: EncDecConfig, *, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return rms_norm(cfg.d_model, eps=cfg.norm_eps, dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
