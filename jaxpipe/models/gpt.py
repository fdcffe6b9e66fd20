"""A GPT: pre-norm decoder-only transformer, in Flax NNX.

The three parts `Embed`, `Block` and `Head` are what a pipeline wants; `GPT` puts them together with no pipeline. With
the defaults the model is GPT-2 exactly (Radford et al., 2019) but for one thing: dropout is on the embedding and on the
outputs of attention and MLP, not on attention probabilities.

Shape legend: B rows, T positions, D d_model, H heads, d dims of a head (D = H*d), F hidden dims of the MLP,
V vocabulary.

Numbers: parameters are `param_dtype`, matrix products run in `dtype`, each kernel used through one cast. Norms,
softmax, rotation and logits are float32 or wider.
"""

import difflib
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpipe.errors import ConfigError

DType = Literal["float32", "bfloat16", "float64"]


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """What a GPT is made of.

    Attributes:
        vocab_size: V.
        max_seq_len: The longest sequence, in tokens. Learned positions cannot go beyond it; rotary ones can.
        num_layers: Number of blocks.
        num_heads: H.
        d_model: D, width of the residual stream.
        d_ff: F. None: 4*D for ``gelu``; 8/3*D, up to the next multiple of 64, for ``swiglu``.
        positions: ``learned``: a vector per position added to the embedding. ``rotary``: queries and keys rotated
            (Su et al., 2021; half-split pairs as in GPT-NeoX and Llama).
        rotary_base: Base of the rotary wavelengths.
        norm: ``layernorm`` or ``rmsnorm``.
        norm_eps: Added to the variance.
        mlp: ``gelu`` (tanh approximation) or ``swiglu``.
        bias: Whether linear layers and layer norms have a bias.
        tied: Whether the head uses the embedding's table.
        dropout: Probability that an element is dropped after the embedding, attention and MLP.
        attention: ``xla``, or ``cudnn`` for the fused kernel of NVIDIA GPUs (``dtype="bfloat16"`` only).
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.

    Raises:
        ConfigError: A value out of range, or values that do not fit together.
    """

    vocab_size: int
    max_seq_len: int
    num_layers: int
    num_heads: int
    d_model: int
    d_ff: int | None = None
    positions: Literal["learned", "rotary"] = "learned"
    rotary_base: float = 10000.0
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    mlp: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True
    tied: bool = True
    dropout: float = 0.0
    attention: Literal["xla", "cudnn"] = "xla"
    dtype: DType = "float32"
    param_dtype: DType = "float32"

    def __post_init__(self):
        for name in ("dtype", "param_dtype"):  # jnp.bfloat16 is as good as "bfloat16"
            if not isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, jnp.dtype(value).name)
        for name, hint in get_type_hints(GPTConfig).items():
            value, choices = getattr(self, name), get_args(hint)
            if str in map(type, choices) and value not in choices:
                near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)[0]
                raise ConfigError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}; try {near!r}")
            if hint is int and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1; try 1")
        if self.d_model % self.num_heads:
            below = self.d_model // self.num_heads * self.num_heads
            near = f"{below} or {below + self.num_heads}" if below else f"{self.num_heads}"
            raise ConfigError(f"d_model={self.d_model} must be divisible by num_heads={self.num_heads}; try {near}")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ConfigError(
                f"positions='rotary' rotates pairs: d_model/num_heads={self.d_model}/{self.num_heads}={self.head_dim} "
                f"must be even; try d_model={(self.head_dim + 1) * self.num_heads}"
            )
        if self.d_ff is not None and self.d_ff < 1:
            raise ConfigError(f"d_ff={self.d_ff} must be at least 1; try {4 * self.d_model}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout={self.dropout} must be at least 0 and below 1; try 0.1")
        for name, near in (("norm_eps", 1e-5), ("rotary_base", 1e4)):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0; try {near}")
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ConfigError(f"dtype={self.dtype!r} must be 'bfloat16' for attention='cudnn'; try attention='xla'")

    @property
    def head_dim(self) -> int:
        """d, dims of a head."""
        return self.d_model // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """F, with the default worked out."""
        if self.d_ff is not None:
            return self.d_ff
        return 4 * self.d_model if self.mlp == "gelu" else math.ceil(8 * self.d_model / 3 / 64) * 64

    @property
    def wide_dtype(self) -> Any:
        """Float32, or float64 for a float64 model: what norms, softmax, rotation and logits are computed in."""
        return jnp.promote_types(self.dtype, jnp.float32)


BYTES = 256
GPT2_TOKENS = 50257

PRESETS: dict[str, GPTConfig] = {
    name: GPTConfig(
        vocab_size=vocab_size, max_seq_len=max_seq_len, num_layers=num_layers, num_heads=num_heads, d_model=d_model
    )
    for name, vocab_size, max_seq_len, num_layers, num_heads, d_model in (
        ("tiny", BYTES, 128, 4, 4, 64),
        ("small", BYTES, 256, 8, 4, 256),
        ("base", BYTES, 512, 12, 8, 512),
        ("gpt2-124m", GPT2_TOKENS, 1024, 12, 12, 768),
        ("gpt2-350m", GPT2_TOKENS, 1024, 24, 16, 1024),
        ("gpt2-774m", GPT2_TOKENS, 1024, 36, 20, 1280),
        ("gpt2-1.5b", GPT2_TOKENS, 1024, 48, 25, 1600),
    )
}
"""Named sizes: three over bytes, and GPT-2's four. Vary one with `dataclasses.replace`."""


class Embed(nnx.Module):
    """Tokens to vectors. `table` is [V, D]; `positions`, if learned, [max_seq_len, D]."""

    def __init__(self, cfg: GPTConfig, *, rngs: nnx.Rngs):
        self.dtype, self.param_dtype = cfg.dtype, cfg.param_dtype
        self.table = nnx.Param(_normal(rngs, (cfg.vocab_size, cfg.d_model), cfg.param_dtype))
        self.positions = nnx.data(None)
        if cfg.positions == "learned":
            self.positions = nnx.Param(_normal(rngs, (cfg.max_seq_len, cfg.d_model), cfg.param_dtype))
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
        x_BTD = jnp.take(self.table[...], tokens_BT, axis=0).astype(jnp.promote_types(self.param_dtype, self.dtype))
        if self.positions is not None:
            positions, num_tokens = self.positions[...], tokens_BT.shape[1]
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
        y_BTHd = _attend(q_BTHd, k_BTHd, v_BTHd, self.implementation)
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

    def __init__(self, cfg: GPTConfig, *, rngs: nnx.Rngs):
        self.norm1 = _norm(cfg, rngs=rngs)
        self.attn = Attention(cfg, rngs=rngs)
        self.dropout1 = nnx.Dropout(cfg.dropout, rngs=rngs)
        self.norm2 = _norm(cfg, rngs=rngs)
        self.mlp = MLP(cfg, rngs=rngs)
        self.dropout2 = nnx.Dropout(cfg.dropout, rngs=rngs)

    def __call__(self, x_BTD):
        """[B, T, D] -> [B, T, D], both of the compute dtype."""
        x_BTD += self.dropout1(self.attn(self.norm1(x_BTD).astype(x_BTD.dtype)))
        x_BTD += self.dropout2(self.mlp(self.norm2(x_BTD).astype(x_BTD.dtype)))
        return x_BTD


class Head(nnx.Module):
    """The last norm and the logits. `kernel` is [V, D], tied or not, so that a tie is the same array."""

    def __init__(self, cfg: GPTConfig, *, rngs: nnx.Rngs):
        self.dtype, self.wide_dtype = cfg.dtype, cfg.wide_dtype
        self.norm = _norm(cfg, rngs=rngs)
        self.kernel = nnx.Param(_normal(rngs, (cfg.vocab_size, cfg.d_model), cfg.param_dtype))

    def __call__(self, x_BTD):
        """[B, T, D] -> logits [B, T, V], float32 or wider."""
        y_BTD, kernel_VD = self.norm(x_BTD).astype(self.dtype), self.kernel[...].astype(self.dtype)
        return jnp.einsum("btd,vd->btv", y_BTD, kernel_VD, preferred_element_type=self.wide_dtype)


class GPT(nnx.Module):
    """The whole model with no pipeline.

    Example:
        >>> gpt = GPT(PRESETS["tiny"], rngs=nnx.Rngs(0))
        >>> gpt(jnp.zeros((2, 16), int)).shape
        (2, 16, 256)
    """

    def __init__(self, cfg: GPTConfig, *, rngs: nnx.Rngs):
        self.embed = Embed(cfg, rngs=rngs)
        self.blocks = nnx.List([Block(cfg, rngs=rngs) for _ in range(cfg.num_layers)])
        self.head = Head(cfg, rngs=rngs)
        if cfg.tied:
            self.head.kernel = self.embed.table

    def __call__(self, tokens_BT):
        """Integers [B, T] -> logits [B, T, V], float32 or wider."""
        x_BTD = self.embed(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(x_BTD)


def rotate(x_BTHd, positions_T, base: float = 10000.0):
    """Rotates queries or keys by their positions.

    Args:
        x_BTHd: Any float dtype, d even. Dims i and i + d/2 are a pair, turned by ``position * base**(-2i/d)``.
        positions_T: Integers.
        base: Base of the wavelengths.

    Returns:
        Like `x_BTHd`. The scalar product of two rotated vectors depends on the difference of their positions only.

    Source: Su et al., 2021, "RoFormer". There neighbouring dims are a pair; here the halves, as in GPT-NeoX and Llama.
    """
    half = x_BTHd.shape[-1] // 2
    dtype = jnp.promote_types(x_BTHd.dtype, jnp.float32)
    angle_Td = positions_T[:, None].astype(dtype) * (base ** (-jnp.arange(half, dtype=dtype) / half))[None]
    cos, sin = jnp.cos(angle_Td)[None, :, None], jnp.sin(angle_Td)[None, :, None]
    a, b = x_BTHd[..., :half].astype(dtype), x_BTHd[..., half:].astype(dtype)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHd.dtype)


def num_params(cfg: GPTConfig) -> int:
    """Parameters of the model; a tied table counts once.

    Example:
        >>> num_params(PRESETS["gpt2-124m"])
        124439808
    """
    D, F, bias = cfg.d_model, cfg.hidden_dim, int(cfg.bias)
    norm = D * (1 + bias) if cfg.norm == "layernorm" else D
    attention = (D + bias) * 3 * D + (D + bias) * D
    mlp = (D + bias) * F * (2 if cfg.mlp == "swiglu" else 1) + (F + bias) * D
    embed = cfg.vocab_size * D + (cfg.max_seq_len * D if cfg.positions == "learned" else 0)
    return embed + cfg.num_layers * (attention + mlp + 2 * norm) + norm + (0 if cfg.tied else cfg.vocab_size * D)


def flops_per_token(cfg: GPTConfig, seq_len: int) -> int:
    """Floating-point operations of the forward pass's matrix products, per token; a training step takes 3 times that.

    Attention counts the whole T x T square, as XLA computes it, not its causal half.

    Args:
        cfg: The model.
        seq_len: T.
    """
    D, F = cfg.d_model, cfg.hidden_dim
    weights = 4 * D * D + D * F * (3 if cfg.mlp == "swiglu" else 2)
    return cfg.num_layers * (2 * weights + 4 * seq_len * D) + 2 * D * cfg.vocab_size


def _attend(q_BTHd, k_BTHd, v_BTHd, implementation: Literal["xla", "cudnn"]):
    """Causal attention with scale 1/sqrt(d)."""
    if q_BTHd.dtype != jnp.float64:
        return jax.nn.dot_product_attention(q_BTHd, k_BTHd, v_BTHd, is_causal=True, implementation=implementation)
    # jax.nn rounds the softmax to float32 even then.
    T = q_BTHd.shape[1]
    scores_BHTT = jnp.einsum("bqhd,bkhd->bhqk", q_BTHd, k_BTHd) / math.sqrt(q_BTHd.shape[-1])
    causal_TT = jnp.tril(jnp.ones((T, T), bool))
    probs_BHTT = jax.nn.softmax(jnp.where(causal_TT[None, None], scores_BHTT, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", probs_BHTT, v_BTHd)


_STD = 0.02  # of every weight matrix at the start, as in GPT-2


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype):
    return _STD * jax.random.normal(rngs.params(), shape, dtype)


def _linear(cfg: GPTConfig, num_in: int, num_out: int, *, residual: bool = False, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer; `residual` shrinks it so that the sum of all 2*num_layers residuals starts at the same size."""
    return nnx.Linear(
        num_in,
        num_out,
        use_bias=cfg.bias,
        dtype=jnp.dtype(cfg.dtype),
        param_dtype=jnp.dtype(cfg.param_dtype),
        kernel_init=nnx.initializers.normal(_STD / math.sqrt(2 * cfg.num_layers) if residual else _STD),
        rngs=rngs,
    )


def _norm(cfg: GPTConfig, *, rngs: nnx.Rngs) -> nnx.LayerNorm | nnx.RMSNorm:
    """A norm that computes, and answers, in float32 or wider."""
    wide, param_dtype = cfg.wide_dtype, jnp.dtype(cfg.param_dtype)
    if cfg.norm == "rmsnorm":
        return nnx.RMSNorm(cfg.d_model, epsilon=cfg.norm_eps, dtype=wide, param_dtype=param_dtype, rngs=rngs)
    return nnx.LayerNorm(
        cfg.d_model,
        epsilon=cfg.norm_eps,
        dtype=wide,
        param_dtype=param_dtype,
        use_bias=cfg.bias,
        use_fast_variance=False,  # E[x²] - E[x]² cancels where the residual stream has a large mean
        rngs=rngs,
    )
