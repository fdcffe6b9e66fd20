"""Training runs: a config in, a trained model, metrics and a page out.

    assemble  from a config to the parts of a run
    loop      what comes before the steps and after them; `training` the steps in order
    step      one compiled step and one measurement; `optim` the optimizer
    track     a step's numbers; `health` what if they are wrong; `watchdog` what if none come; `signals` Ctrl-C
    keeper    when the run is saved
    evaluate  a checkpoint on held-out data
    products  what is left for people at the end; `report/` metrics, page, summary
    model     the old place of `jaxpipe.models.build`

What a run may say is in `jaxpipe.config`, its tokens in `jaxpipe.data`, its checkpoints in `jaxpipe.checkpoint`. Read
`assemble` first, then `training`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from jaxpipe.config.run import Config
from jaxpipe.train.health import NonFiniteError

if TYPE_CHECKING:
    from jaxpipe.checkpoint.inherit import load
    from jaxpipe.train.loop import train
    from jaxpipe.train.training import Result

_LAZY = {"load": "jaxpipe.checkpoint.inherit", "train": "jaxpipe.train.loop", "Result": "jaxpipe.train.training"}
"""Imported at first use: a plan reads a run's config and needs no model."""

__all__ = ["Config", "NonFiniteError", "Result", "load", "train"]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'jaxpipe.train' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
