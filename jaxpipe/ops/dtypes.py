"""The wider dtype that sums are made in."""

from typing import Any

import jax.numpy as jnp


def wide(dtype: Any) -> Any:
    """Float32, or float64 for float64: what norms, softmax, rotation and logits are computed in."""
    return jnp.promote_types(dtype, jnp.float32)
