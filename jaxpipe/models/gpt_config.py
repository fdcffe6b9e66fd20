"""What a GPT is made of, its named sizes, and what follows from them by counting: parameters and operations."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from jaxpipe.errors import ConfigError
from jaxpipe.models.fields import DType, WideDType, check_above_zero, check_fields
from jaxpipe.ops.attention_choice import Choice, Requested, check_attention, choose
from jaxpipe.ops.dtypes import wide


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """What a GPT is made of.

    Attributes:
        vocab_size: V, how many different tokens there are.
        max_seq_len: The longest sequence, in tokens. Learned positions cannot go beyond it; rotary ones can.
        num_layers: Number of blocks.
        num_heads: H, heads of the queries.
        d_model: D, width of the residual stream.
        num_kv_heads: K, heads of keys and values, each shared by H/K queries (Ainslie et al., 2023, "GQA"). None: H.
        head_width: d, dims of a head. None: D/H.
        d_ff: F. None: 4*D for ``gelu``; 8/3*D, up to the next multiple of 64, for ``swiglu``.
        positions: ``learned``: a vector per position added to the embedding. ``rotary``: queries and keys rotated
            (Su et al., 2021; half-split pairs as in GPT-NeoX and Llama).
        rotary_base: Base of the rotary wavelengths.
        rotary_factor: How much longer the longest wavelengths become, as in Llama 3.1; 1: not at all.
        rotary_low_freq_factor: Wavelengths above ``rotary_original_len`` over this are stretched by the whole factor.
        rotary_high_freq_factor: Wavelengths below ``rotary_original_len`` over this stay; those between are blended.
        rotary_original_len: The longest sequence before the stretching.
        sliding_window: W: a token sees itself and the W-1 tokens before it. None: all before it.
        qk_norm: Whether queries and keys of a head go through an RMS norm before they are rotated, as in Qwen3.
        norm: ``layernorm`` (mean and variance) or ``rmsnorm`` (the root of the mean square).
        norm_eps: Added to the variance.
        mlp: ``gelu`` (tanh approximation) or ``swiglu``.
        bias: Whether linear layers and layer norms have a bias.
        qkv_bias: Whether the map to queries, keys and values has one, as in Qwen2. None: as `bias` says.
        tied: Whether the head uses the embedding's table.
        dropout: Probability that an element is dropped after the embedding, attention and MLP.
        attention: ``cudnn`` for the fused kernel of NVIDIA GPUs (16-bit `dtype` only), ``xla`` for scores as a whole,
            ``blockwise`` for plain JAX whose memory is linear in the sequence. ``auto``: the first where it can be,
            else the second for short sequences and the third for long ones.
        num_experts: E, MLPs of a mixture-of-experts block (see `jaxpipe.models.moe`). 0: every block is dense.
        experts_per_token: K, how many of them a token goes to.
        moe_every: Every n-th block is a mixture: blocks n-1, 2n-1, … counted from 0.
        capacity_factor: Tokens that an expert takes of one sequence, over the mean; those beyond skip it. E/K or
            more drops none.
        aux_loss_weight: Weight of the load-balancing loss.
        router_z_weight: Weight of the router's z-loss.
        sequence_parallel: Where the mesh axis `tensor` cuts matrix products, cut sequences over it between them: norms,
            dropout and residual sums are shared then, and what passes from block to block is smaller.
        dtype: Dtype of the computation. ``float16`` wants a loss scale in training, see `Pipeline.value_and_grad`.
        param_dtype: Dtype of the parameters.

    Raises:
        ConfigError: A value out of range, or values that do not fit together.
    """

    vocab_size: int
    max_seq_len: int
    num_layers: int
    num_heads: int
    d_model: int
    num_kv_heads: int | None = None
    head_width: int | None = None
    d_ff: int | None = None
    positions: Literal["learned", "rotary"] = "learned"
    rotary_base: float = 10000.0
    rotary_factor: float = 1.0
    rotary_low_freq_factor: float = 1.0
    rotary_high_freq_factor: float = 4.0
    rotary_original_len: int = 8192
    sliding_window: int | None = None
    qk_norm: bool = False
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    mlp: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True
    qkv_bias: bool | None = None
    tied: bool = True
    dropout: float = 0.0
    attention: Requested = "auto"
    num_experts: int = 0
    experts_per_token: int = 1
    moe_every: int = 2
    capacity_factor: float = 1.25
    aux_loss_weight: float = 0.01
    router_z_weight: float = 0.0
    sequence_parallel: bool = False
    dtype: DType = "float32"
    param_dtype: WideDType = "float32"

    def __post_init__(self):
        check_fields(self, num_experts=0)
        self._check_heads()
        for name, near in (("d_ff", 4 * self.d_model), ("sliding_window", self.max_seq_len)):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1; try {near}")
        check_above_zero(
            self, norm_eps=1e-5, rotary_base=1e4, capacity_factor=1.25, rotary_factor=1.0, rotary_low_freq_factor=1.0
        )
        if self.rotary_high_freq_factor <= self.rotary_low_freq_factor:
            raise ConfigError(
                f"rotary_high_freq_factor={self.rotary_high_freq_factor} must exceed rotary_low_freq_factor="
                f"{self.rotary_low_freq_factor}; try {4 * self.rotary_low_freq_factor}"
            )
        check_attention(self.attention, self.dtype)
        for name in ("aux_loss_weight", "router_z_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 0; try 0.0")
        if self.num_experts:
            self._check_experts()

    def _check_heads(self):
        for name, near in (("num_kv_heads", self.num_heads), ("head_width", 64)):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1; try {near}")
        if self.num_heads % self.kv_heads:
            near = next(n for n in range(min(self.kv_heads, self.num_heads), 0, -1) if self.num_heads % n == 0)
            raise ConfigError(f"num_kv_heads={self.kv_heads} must divide num_heads={self.num_heads}; try {near}")
        if self.head_width is None and self.d_model % self.num_heads:
            below = self.d_model // self.num_heads * self.num_heads
            near = f"{below} or {below + self.num_heads}" if below else f"{self.num_heads}"
            raise ConfigError(f"d_model={self.d_model} must be divisible by num_heads={self.num_heads}; try {near}")
        if self.positions == "rotary" and self.head_dim % 2:
            if self.head_width is not None:
                raise ConfigError(
                    f"head_width={self.head_width} must be even for positions='rotary', which rotates pairs; "
                    f"try {self.head_width + 1}"
                )
            raise ConfigError(
                f"positions='rotary' rotates pairs: d_model/num_heads={self.d_model}/{self.num_heads}={self.head_dim} "
                f"must be even; try d_model={(self.head_dim + 1) * self.num_heads}"
            )

    def _check_experts(self):
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"experts_per_token={self.experts_per_token} must not exceed num_experts={self.num_experts}; "
                f"try {self.num_experts}"
            )
        if self.moe_every > self.num_layers:
            raise ConfigError(
                f"moe_every={self.moe_every} must not exceed num_layers={self.num_layers}, or no block has the "
                f"num_experts={self.num_experts}; try {self.num_layers}"
            )

    @property
    def head_dim(self) -> int:
        """d, with the default worked out."""
        return self.d_model // self.num_heads if self.head_width is None else self.head_width

    @property
    def kv_heads(self) -> int:
        """K, with the default worked out."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def has_qkv_bias(self) -> bool:
        """`qkv_bias`, with the default worked out."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def hidden_dim(self) -> int:
        """F, with the default worked out."""
        if self.d_ff is not None:
            return self.d_ff
        return 4 * self.d_model if self.mlp == "gelu" else math.ceil(8 * self.d_model / 3 / 64) * 64

    @property
    def wide_dtype(self) -> Any:
        """Float32, or float64 for a float64 model: what norms, softmax, rotation and logits are computed in."""
        return wide(self.dtype)

    @property
    def init_std(self) -> float:
        """Spread of every weight matrix at the start, as in GPT-2."""
        return 0.02

    @property
    def residual_init_std(self) -> float:
        """Spread of what is added to the residual stream: all 2*num_layers sums together start at the same size."""
        return self.init_std / math.sqrt(2 * self.num_layers)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every block: ``block`` for all, or ``dense`` and ``moe`` where there are experts.

        Example:
            >>> from dataclasses import replace
            >>> replace(PRESETS["tiny"], num_experts=8).kinds
            ('dense', 'moe', 'dense', 'moe')
        """
        if not self.num_experts:
            return ("block",) * self.num_layers
        return tuple("dense" if (i + 1) % self.moe_every else "moe" for i in range(self.num_layers))

    def attention_for(self, seq_len: int, capability: float | None) -> Choice:
        """Which attention is taken, and why.

        Args:
            seq_len: T.
            capability: Of the devices, see `jaxpipe.ops.attention_choice.choose`.

        Example:
            >>> print(PRESETS["tiny"].attention_for(128, None))
            xla: 128 x 128 scores are few, and no NVIDIA GPU computes them
        """
        shape = {"dtype": self.dtype, "head_dim": self.head_dim, "queries": seq_len, "keys": seq_len}
        return choose(self.attention, capability=capability, **shape)

    def expert_capacity(self, seq_len: int) -> int:
        """C, how many tokens of one sequence an expert takes at most: ``capacity_factor*K*T/E``, rounded up, at most T.

        Args:
            seq_len: T.
        """
        mean = self.experts_per_token * seq_len / self.num_experts
        return min(seq_len, math.ceil(round(self.capacity_factor * mean, 6)))


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


def num_params(cfg: GPTConfig) -> int:
    """Parameters of the model; a tied table counts once, every expert counts.

    Example:
        >>> num_params(PRESETS["gpt2-124m"])
        124439808
    """
    D, F, E, bias = cfg.d_model, cfg.hidden_dim, cfg.num_experts, int(cfg.bias)
    norm = D * (1 + bias) if cfg.norm == "layernorm" else D
    inner, heads = cfg.num_heads * cfg.head_dim, cfg.num_heads + 2 * cfg.kv_heads
    attention = (D + cfg.has_qkv_bias) * heads * cfg.head_dim + (inner + bias) * D + 2 * cfg.qk_norm * cfg.head_dim
    mlp = (D + bias) * F * (2 if cfg.mlp == "swiglu" else 1) + (F + bias) * D
    mlps = sum(D * E + E * mlp if kind == "moe" else mlp for kind in cfg.kinds)
    embed = cfg.vocab_size * D + (cfg.max_seq_len * D if cfg.positions == "learned" else 0)
    return embed + cfg.num_layers * (attention + 2 * norm) + mlps + norm + (0 if cfg.tied else cfg.vocab_size * D)


def flops_per_token(cfg: GPTConfig, seq_len: int) -> int:
    """Floating-point operations of the forward pass's matrix products, per token; a training step takes 3 times that.

    Attention counts the whole T x T square, as XLA computes it, not its causal half; a mixture of experts all places
    of its experts, as XLA computes them, taken or not (that is `capacity_factor` times the tokens' share).

    Args:
        cfg: The model.
        seq_len: T.
    """
    D, F, E, T = cfg.d_model, cfg.hidden_dim, cfg.num_experts, seq_len
    inner, heads = cfg.num_heads * cfg.head_dim, cfg.num_heads + 2 * cfg.kv_heads
    mlp = 2 * D * F * (3 if cfg.mlp == "swiglu" else 2)
    places = E * cfg.expert_capacity(T) if E else 0
    mlps = sum(2 * D * E * T + places * mlp if kind == "moe" else T * mlp for kind in cfg.kinds)
    return (
        cfg.num_layers * (2 * D * (heads * cfg.head_dim + inner) + 4 * T * inner) + mlps // T + 2 * D * cfg.vocab_size
    )
