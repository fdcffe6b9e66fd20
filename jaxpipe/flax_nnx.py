"""Flax NNX, or one line that says which versions do not go together.

NNX is built on parts of JAX that change: flax 0.12.8 and 0.12.9 do not load with jax 0.11.2 or later. Schedules, plans
and models of plain functions or of Linen need no NNX and must not fail with it: only those who need it import it, from
here.
"""

import flax
import jax

from jaxpipe.errors import VersionError

try:
    from flax import nnx
except (AttributeError, ImportError) as error:
    raise VersionError(
        f"flax.nnx of flax {flax.__version__} does not load with jax {jax.__version__} ({error}); "
        "try pip install 'flax>=0.12.10' 'jax<=0.12.0.1'"
    ) from error

__all__ = ["nnx"]
