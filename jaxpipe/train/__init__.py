"""Training runs: a TOML config in, a trained model, metrics and curves out.

Reading order: `sections` and `config` (what can be said), `corpus` and `data` (tokens, then batches), `model`,
`assemble` (the parts of a run), `optim`, `step` (one compiled step), `track` (its numbers), `loop` (all steps).
"""

from jaxpipe.train.config import Config, load
from jaxpipe.train.health import NonFiniteError
from jaxpipe.train.loop import train
from jaxpipe.train.training import Result

__all__ = ["Config", "NonFiniteError", "Result", "load", "train"]
