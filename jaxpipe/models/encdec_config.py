"""What an encoder-decoder is made of, its named sizes, and its number of parameters."""

from dataclasses import dataclass
from typing import Any, Literal

from jaxpipe.errors import ConfigError
from jaxpipe.models.fields import WideDType, check_above_zero, check_fields
from jaxpipe.ops.attention_choice import Requested, check_attention
from jaxpipe.ops.dtypes import wide


@dataclass(frozen=True, kw_only=True)
class EncDecConfig:
    """What an encoder-decoder is made of.

    Attributes:
        vocab_size: V, of both sides.
        num_encoder_layers: Encoder blocks.
        num_decoder_layers: Decoder blocks.
        num_heads: H.
        d_model: D, width of both residual streams.
        head_dim: d, dims of a head (T5's d_kv); H*d may differ from D.
        d_ff: F.
        mlp: ``relu`` (T5), or ``gated-gelu`` (T5 1.1; Shazeer, 2020, "GLU Variants Improve Transformer").
        positions: ``relative``: T5's, a bias per head and bucket of distances added to the scores of self-attention,
            one table for all blocks of a stack, and **no** scale 1/sqrt(d) on any score: the initial weights of the
            queries have it. ``rotary``: queries and keys of self-attention are rotated, all scores have the scale.
        num_buckets: Of distances, for ``relative``.
        max_distance: From where all distances share the last bucket, for ``relative``.
        rotary_base: Base of the rotary wavelengths.
        norm_eps: Added to the mean square.
        tied: Whether the head uses the embedding's table; its logits are then scaled by d_model**-0.5.
        dropout: Probability that an element is dropped after the embeddings, attention and MLP.
        attention: As in `jaxpipe.models.gpt_config.GPTConfig`; with ``auto`` self-attention with ``relative`` positions
            is never ``cudnn``, which takes a bias only whole and rounded.
        dtype: Dtype of the computation; no ``float16``, whose range T5's activations leave.
        param_dtype: Dtype of the parameters.

    Raises:
        ConfigError: A value out of range, or values that do not fit together.
    """

    vocab_size: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_heads: int
    d_model: int
    head_dim: int
    d_ff: int
    mlp: Literal["relu", "gated-gelu"] = "relu"
    positions: Literal["relative", "rotary"] = "relative"
    num_buckets: int = 32
    max_distance: int = 128
    rotary_base: float = 10000.0
    norm_eps: float = 1e-6
    tied: bool = True
    dropout: float = 0.0
    attention: Requested = "auto"
    dtype: WideDType = "float32"
    param_dtype: WideDType = "float32"

    def __post_init__(self):
        check_fields(self)
        check_attention(self.attention, self.dtype)
        check_above_zero(self, norm_eps=1e-6, rotary_base=1e4)
        if self.positions == "rotary" and self.head_dim % 2:
            raise ConfigError(
                f"head_dim={self.head_dim} must be even for positions='rotary', which rotates pairs; "
                f"try {self.head_dim + 1}"
            )
        if self.num_buckets % 4:
            near = max(4, self.num_buckets // 4 * 4)
            raise ConfigError(f"num_buckets={self.num_buckets} must be divisible by 4; try {near}")
        if self.max_distance <= self.num_buckets // 2:
            raise ConfigError(
                f"max_distance={self.max_distance} must exceed num_buckets/2={self.num_buckets // 2}; "
                f"try {4 * self.num_buckets}"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every block, in order: all of the encoder, then all of the decoder."""
        return ("encoder",) * self.num_encoder_layers + ("decoder",) * self.num_decoder_layers

    @property
    def wide_dtype(self) -> Any:
        """Float32, or float64 for a float64 model: what norms, softmax, rotation and logits are computed in."""
        return wide(self.dtype)


BYTES = 256
T5_TOKENS = 32128

PRESETS: dict[str, EncDecConfig] = {
    name: EncDecConfig(
        vocab_size=vocab_size,
        num_encoder_layers=num_layers,
        num_decoder_layers=num_layers,
        num_heads=num_heads,
        d_model=d_model,
        head_dim=head_dim,
        d_ff=d_ff,
        mlp="gated-gelu" if gated else "relu",
        tied=not gated,
    )
    for name, gated, vocab_size, num_layers, num_heads, d_model, head_dim, d_ff in (
        ("tiny", False, BYTES, 2, 4, 64, 16, 256),
        ("t5-small", False, T5_TOKENS, 6, 8, 512, 64, 2048),
        ("t5-base", False, T5_TOKENS, 12, 12, 768, 64, 3072),
        ("t5-large", False, T5_TOKENS, 24, 16, 1024, 64, 4096),
        ("t5-3b", False, T5_TOKENS, 24, 32, 1024, 128, 16384),
        ("t5-11b", False, T5_TOKENS, 24, 128, 1024, 128, 65536),
        ("t5-1.1-small", True, T5_TOKENS, 8, 6, 512, 64, 1024),
        ("t5-1.1-base", True, T5_TOKENS, 12, 12, 768, 64, 2048),
        ("t5-1.1-large", True, T5_TOKENS, 24, 16, 1024, 64, 2816),
        ("t5-1.1-xl", True, T5_TOKENS, 24, 32, 2048, 64, 5120),
        ("t5-1.1-xxl", True, T5_TOKENS, 24, 64, 4096, 64, 10240),
    )
}
"""Named sizes: one over bytes, the five of T5 (Raffel et al., 2020, section 3.7) and the five of its version 1.1. Vary
one with `dataclasses.replace`."""


def num_params(cfg: EncDecConfig) -> int:
    """Parameters of the model; what parts share counts once.

    Example:
        >>> num_params(PRESETS["t5-small"])
        60506624
    """
    D, F = cfg.d_model, cfg.d_ff
    attention = 4 * D * cfg.num_heads * cfg.head_dim
    mlp = D * F * (3 if cfg.mlp == "gated-gelu" else 2)
    encoder = cfg.num_encoder_layers * (attention + mlp + 2 * D)
    decoder = cfg.num_decoder_layers * (2 * attention + mlp + 3 * D)
    tables = 2 * cfg.num_buckets * cfg.num_heads if cfg.positions == "relative" else 0
    return (1 if cfg.tied else 2) * cfg.vocab_size * D + encoder + D + decoder + D + tables
