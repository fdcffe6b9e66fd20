"""Products with a result wider than their operands, whose gradients are products of the operands' dtype again.

``preferred_element_type=float32`` asks for the sums of a product of 16-bit operands as they are accumulated. JAX keeps
it for the two products of the gradient, which then have a float32 operand, the gradient that arrives: GPUs run them as
float32 (TF32) products, at half the speed or less, and what they make is rounded to 16 bits in the end.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero


def dot_general(x, y, dimension_numbers, preferred_element_type: Any = None):
    """Like `jax.lax.dot_general`, but differentiated in the operands' dtype: what arrives is rounded to it first.

    Sums are accumulated in `preferred_element_type` forwards and, on accelerators, in float32 backwards. Where it is
    not wider than the operands this is `jax.lax.dot_general`.

    Args:
        x: Any shape.
        y: Any shape, of the dtype of `x`.
        dimension_numbers: As there.
        preferred_element_type: Dtype of the result.
    """
    wide = jnp.dtype(preferred_element_type or x.dtype)
    if x.dtype != y.dtype or wide.itemsize <= x.dtype.itemsize:
        return lax.dot_general(x, y, dimension_numbers, preferred_element_type=preferred_element_type)
    return _widened(x, y, dimension_numbers, wide)


def vocab_logits(kernel, features):
    """``[V, D]`` and ``[..., D]`` -> ``[..., V]``, float32 or wider, multiplied in the features' dtype."""
    dims = ((features.ndim - 1,), (1,)), ((), ())
    wide = jnp.promote_types(features.dtype, jnp.float32)
    return dot_general(features, kernel.astype(features.dtype), dims, preferred_element_type=wide)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _widened(x, y, dimension_numbers, wide):
    return lax.dot_general(x, y, dimension_numbers, preferred_element_type=wide)


@partial(_widened.defjvp, symbolic_zeros=True)
def _widened_jvp(dimension_numbers, wide, primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    # A product whose result has its operands' dtype has transposes of this dtype.
    parts = []
    if not isinstance(dx, SymbolicZero):
        parts.append(lax.dot_general(dx, y, dimension_numbers))
    if not isinstance(dy, SymbolicZero):
        parts.append(lax.dot_general(x, dy, dimension_numbers))
    return _widened(x, y, dimension_numbers, wide), sum(parts[1:], parts[0]).astype(wide)
