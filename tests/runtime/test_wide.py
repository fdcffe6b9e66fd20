"""Weight gradients in the dtype of their sums: which are retyped, and that nothing else changes."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxpipe.jax_internals import ClosedJaxpr, Jaxpr
from jaxpipe.runtime.stage.wide import wide_gradients

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.bfloat16)


def normal(*shape: int) -> jax.Array:
    """A bfloat16 parameter."""
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.bfloat16)


def shifted(p: Any, x: jax.Array) -> jax.Array:
    """A product and a bias."""
    return x @ p["kernel"] + p["bias"][None]


def scaled(p: Any, x: jax.Array) -> jax.Array:
    """A scale that works in float32."""
    return (x.astype(jnp.float32) * p["scale"].astype(jnp.float32)[None]).astype(x.dtype)


def by_heads(p: Any, x: jax.Array) -> jax.Array:
    """A kernel of three dims, turned and cut before it is used."""
    q = jnp.einsum("bi,hio->bho", x, p["kernel"])
    return q[:, :, 1:].sum(1)


def used_twice(p: Any, x: jax.Array) -> jax.Array:
    """Two products of one kernel."""
    return jnp.tanh(x @ p["kernel"]) @ p["kernel"].T


def joined(p: Any, x: jax.Array) -> jax.Array:
    """Two halves of one kernel in products of their own."""
    first, second = jnp.split(p["kernel"], 2, axis=1)
    return jnp.tanh(x @ first) * (x @ second)


def scanned(p: Any, x: jax.Array) -> jax.Array:
    """A loop over layers."""
    return lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, p["kernel"])[0]


def looked_up(p: Any, x: jax.Array) -> jax.Array:
    """Rows of a table."""
    return x + p["table"][jnp.arange(6) % 3]


def remembered(p: Any, x: jax.Array) -> jax.Array:
    """Calls within calls."""
    return jax.checkpoint(jax.jit(shifted))(p, x)


LINEAR = {"kernel": normal(4, 4), "bias": normal(4)}
WIDE = {
    "linear": (shifted, LINEAR),
    "scale": (scaled, {"scale": normal(4)}),
    "heads": (by_heads, {"kernel": normal(2, 4, 5)}),
    "twice": (used_twice, {"kernel": normal(4, 4)}),
    "halves": (joined, {"kernel": normal(4, 8)}),
    "calls": (remembered, LINEAR),
}
NARROW = {"loop": (scanned, {"kernel": normal(3, 4, 4)}), "look-up": (looked_up, {"table": normal(3, 4)})}


def backward(apply: Any, params: Any, x: jax.Array) -> tuple[Any, Any]:
    """Gradients of the parameters and of the input."""
    y, vjp = jax.vjp(apply, params, x)
    return vjp(jnp.cos(y))


def products(jaxpr: Any) -> int:
    """Matrix products of a program, with those in its calls."""
    inner = (v for eqn in jaxpr.eqns for v in eqn.params.values() if isinstance(v, Jaxpr | ClosedJaxpr))
    own = sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)
    return own + sum(products(getattr(body, "jaxpr", body)) for body in inner)


@pytest.mark.parametrize("case", WIDE | NARROW)
def test_gradients_are_wide_where_a_product_or_sum_makes_them(case):
    apply, params = (WIDE | NARROW)[case]
    run = partial(backward, apply)
    (gradient, dx), (plain, plain_dx) = wide_gradients(run, params, X), run(params, X)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradient)} == {"float32" if case in WIDE else "bfloat16"}
    assert dx.dtype == jnp.bfloat16
    np.testing.assert_array_equal(dx, plain_dx)
    wide = jax.make_jaxpr(partial(wide_gradients, run))(params, X).jaxpr
    assert products(wide) == products(jax.make_jaxpr(run)(params, X).jaxpr)
    exact, _ = run(*jax.tree.map(lambda x: x.astype(jnp.float32), (params, X)))
    for own, rounded, right in zip(*map(jax.tree.leaves, (gradient, plain, exact)), strict=True):
        np.testing.assert_allclose(own, right, atol=0.05 * float(jnp.abs(right).max()))
        np.testing.assert_allclose(own, rounded.astype(jnp.float32), rtol=2e-2, atol=0.02 * float(jnp.abs(right).max()))


def test_a_product_is_asked_for_its_sum_before_it_rounds():
    """The gradient is exactly the product of the bfloat16 operands, added up in float32."""
    run = partial(backward, lambda p, x: x @ p)
    gradient, _ = wide_gradients(run, LINEAR["kernel"], X)
    dy = jnp.cos(X @ LINEAR["kernel"])
    exact = np.asarray(X, np.float64).T @ np.asarray(dy, np.float64)
    np.testing.assert_allclose(gradient, exact, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(gradient.astype(jnp.bfloat16), np.float64) - exact).max() > 1e-3


def test_float32_programs_are_left_alone():
    def run(params, x):
        calls.append(params)
        return backward(shifted, params, x)

    calls: list[Any] = []
    params, x = jax.tree.map(lambda x: x.astype(jnp.float32), (LINEAR, X))
    wide_gradients(run, params, x)
    assert calls == [params]


def test_a_gradient_that_is_needed_elsewhere_too_stays():
    """Rounded once for all who read it, and computed once."""

    def run(kernel, x):
        gradient, _ = backward(lambda p, x: x @ p, kernel, x)
        return gradient, jnp.tanh(gradient)

    gradient, other = wide_gradients(run, LINEAR["kernel"], X)
    assert gradient.dtype == other.dtype == jnp.bfloat16
