"""The case that the comparison with torch times, as plain numbers that both sides understand."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A float32 GPT with learned positions and a head of its own.

    Attributes:
        d_model: Width of the residual stream.
        num_heads: Attention heads.
        num_layers: Blocks.
        seq: Tokens per row.
        rows: Rows per microbatch.
        vocab_size: Different tokens.
    """

    d_model: int = 256
    num_heads: int = 4
    num_layers: int = 8
    seq: int = 128
    rows: int = 2
    vocab_size: int = 256

    def __str__(self):
        return f"gpt d={self.d_model} L={self.num_layers} T={self.seq} rows={self.rows}"
