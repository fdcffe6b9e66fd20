"""Adapters: modules of a neural network library as a pipeline's model."""

from jaxpipe.nn.nnx import nnx_model

__all__ = ["nnx_model"]
