"""Walls: the identity for values and gradients, and linear cost in depth on CPUs."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.runtime.measure.traffic import computations
from jaxpipe.runtime.stage.wall import wall


def test_a_wall_changes_neither_values_nor_gradients():
    x = jnp.arange(4.0)

    def loss(x, turns):
        (y,) = wall(turns, [x**2])
        return (y * x).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(x, jnp.int32(0))
    np.testing.assert_array_equal(value, (x**3).sum())
    np.testing.assert_array_equal(gradient, 3 * x**2)


def longest_fusion(walls: bool, depth: int = 6) -> int:
    """The instructions of the largest fused computation in a backward through a residual stream."""

    def loss(weights, x, turns):
        for w in weights:
            x = x + jnp.tanh(x @ w) * x
            x = wall(turns, [x])[0] if walls else x
        return x.sum()

    args = [jnp.ones((32, 32))] * depth, jnp.ones((8, 32)), jnp.int32(0)
    text = jax.jit(jax.grad(loss)).lower(*args).compile().as_text() or ""
    return max(len(lines) for name, lines in computations(text).items() if name.startswith("fused"))


def test_no_fusion_reaches_through_a_wall():
    assert longest_fusion(walls=True, depth=10) == longest_fusion(walls=True, depth=5)
    assert longest_fusion(walls=False, depth=10) > longest_fusion(walls=True, depth=10)
