"""Training runs: a TOML config in, a trained model, metrics and curves out.

Reading order: `sections` and `config` (what can be said), `corpus` and `data` (tokens, then batches), `model`,
`assemble` (the parts of a run), `optim`, `step` (one compiled step), `track` (its numbers), `loop` (all steps).
"""

from importlib import import_module
from typing import TYPE_CHECKING

from jaxpipe.train.config import Config
from jaxpipe.train.health import NonFiniteError

if TYPE_CHECKING:
    from jaxpipe.train.inherit import load
    from jaxpipe.train.loop import train
    from jaxpipe.train.training import Result

_LAZY = {"load": "jaxpipe.train.inherit", "train": "jaxpipe.train.loop", "Result": "jaxpipe.train.training"}
"""Imported at first use: a plan reads a run's config and needs no model."""

__all__ = ["Config", "NonFiniteError", "Result", "load", "train"]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'jaxpipe.train' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
