"""Adapters: modules of a neural network library as a pipeline's model."""

from jaxpipe.nn.linen import linen_model
from jaxpipe.nn.nnx import nnx_model, vocab_embed, vocab_head
from jaxpipe.nn.pipelined import Pipelined
from jaxpipe.nn.wrap import from_nnx

__all__ = ["Pipelined", "from_nnx", "linen_model", "nnx_model", "vocab_embed", "vocab_head"]
