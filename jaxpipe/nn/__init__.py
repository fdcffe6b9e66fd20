"""Adapters: modules of a neural network library as a pipeline's model, or with a pipeline inside.

    pipelined    `Pipelined`, an NNX layer whose blocks run as a pipeline; `linen_pipelined` for Linen; `layer` for both
    wrap         `from_nnx`: a model that exists already; `blocks` finds its blocks
    nnx          `nnx_model`, `linen` `linen_model`: a model from its parts; `parts`, `nnx_part`, `linen_part` below

Read `pipelined` first.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxpipe.nn import linen as linen
    from jaxpipe.nn.linen import linen_model
    from jaxpipe.nn.nnx import nnx_model, vocab_embed, vocab_head
    from jaxpipe.nn.pipelined import Pipelined
    from jaxpipe.nn.wrap import from_nnx

_LAZY = {
    "Pipelined": "jaxpipe.nn.pipelined",
    "from_nnx": "jaxpipe.nn.wrap",
    "linen_model": "jaxpipe.nn.linen",
    "nnx_model": "jaxpipe.nn.nnx",
    "vocab_embed": "jaxpipe.nn.nnx",
    "vocab_head": "jaxpipe.nn.nnx",
}
"""Imported at first use: who has Linen modules needs no NNX, see `jaxpipe.flax_nnx`."""

__all__ = ["Pipelined", "from_nnx", "linen", "linen_model", "nnx_model", "vocab_embed", "vocab_head"]


def __getattr__(name: str):
    if name == "linen":
        return import_module("jaxpipe.nn.linen")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'jaxpipe.nn' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
