"""A product for the few rows of a decoding step, on CPUs.

XLA's CPU backend (YNNPACK) first copies a product's right side into an order of its own. That pays where many rows meet
it; a decoding step has few, and its right side is the weights: copying them takes longer than the product. With the
weights on the left side, as ``[out, in]``, they are read once and as they lie.
"""

from math import prod
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxpipe.flax_nnx import nnx

MOST = 32
"""Rows; with more, both ways take as long."""


def kernel_first(x, kernel, dimension_numbers, **options: Any):
    """Like `jax.lax.dot_general` without batch dims, the kernel on the left of the product where `x` has few rows.

    Example:
        >>> x, kernel = jnp.ones((2, 1, 3)), jnp.ones((3, 5))
        >>> kernel_first(x, kernel, (((2,), (0,)), ((), ()))).shape
        (2, 1, 5)
    """
    (x_dims, kernel_dims), _ = dimension_numbers
    out = kernel.ndim - len(kernel_dims)
    if prod(size for dim, size in enumerate(x.shape) if dim not in x_dims) > MOST:
        return lax.dot_general(x, kernel, dimension_numbers, **options)
    turned = lax.dot_general(kernel, x, ((kernel_dims, x_dims), ((), ())), **options)
    turned = lax.optimization_barrier(turned)  # or XLA exchanges the sides again, to be rid of the transpose
    return jnp.moveaxis(turned, range(out), range(-out, 0))


def use_kernel_first(module: nnx.Module) -> nnx.Module:
    """Gives all linear maps of a module that product."""
    for _, part in nnx.iter_graph(module):
        if hasattr(part, "dot_general"):
            part.dot_general = kernel_first
    return module
