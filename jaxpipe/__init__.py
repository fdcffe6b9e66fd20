"""jaxpipe: pipeline parallelism for JAX in which any schedule becomes one XLA program."""

from importlib import import_module
from typing import TYPE_CHECKING

from jaxpipe import errors as errors, schedule as schedule

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jaxpipe import nn as nn
    from jaxpipe.ops.losses import linear_cross_entropy
    from jaxpipe.runtime.gpu import GpuOptions, set_gpu_options
    from jaxpipe.runtime.layout.mesh import describe, make_mesh, simulate_devices
    from jaxpipe.runtime.model import Block, Embed, HeadLoss, Model, VocabEmbed, VocabHead
    from jaxpipe.runtime.pipeline import Pipeline
    from jaxpipe.runtime.sequential import sequential

_LAZY = {
    "GpuOptions": "jaxpipe.runtime.gpu",
    "set_gpu_options": "jaxpipe.runtime.gpu",
    "describe": "jaxpipe.runtime.layout.mesh",
    "make_mesh": "jaxpipe.runtime.layout.mesh",
    "simulate_devices": "jaxpipe.runtime.layout.mesh",
    "Block": "jaxpipe.runtime.model",
    "Embed": "jaxpipe.runtime.model",
    "HeadLoss": "jaxpipe.runtime.model",
    "Model": "jaxpipe.runtime.model",
    "VocabEmbed": "jaxpipe.runtime.model",
    "VocabHead": "jaxpipe.runtime.model",
    "Pipeline": "jaxpipe.runtime.pipeline",
    "linear_cross_entropy": "jaxpipe.ops.losses",
    "sequential": "jaxpipe.runtime.sequential",
}
"""Names that need jax, imported at first use: `import jaxpipe.schedule` must not load jax."""

__all__ = [
    "Block",
    "Embed",
    "GpuOptions",
    "HeadLoss",
    "Model",
    "Pipeline",
    "VocabEmbed",
    "VocabHead",
    "describe",
    "errors",
    "linear_cross_entropy",
    "make_mesh",
    "nn",
    "schedule",
    "sequential",
    "set_gpu_options",
    "simulate_devices",
]


def __getattr__(name: str):
    if name == "nn":
        return import_module("jaxpipe.nn")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'jaxpipe' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
