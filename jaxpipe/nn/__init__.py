"""Adapters: modules of a neural network library as a pipeline's model."""

from jaxpipe.nn.linen import linen_model
from jaxpipe.nn.nnx import nnx_model, vocab_embed, vocab_head

__all__ = ["linen_model", "nnx_model", "vocab_embed", "vocab_head"]
