"""Products wider than their operands, and what their gradients are multiplied in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.ops.products import dot_general, vocab_logits

V, D, T = 24, 8, 6
DIMS = ((1,), (1,)), ((), ())


def operands(dtype: str):
    """A kernel, features and a gradient of the logits."""
    keys = jax.random.split(jax.random.key(0), 3)
    kernel, x, g = (jax.random.normal(k, shape) for k, shape in zip(keys, ((V, D), (T, D), (T, V)), strict=True))
    return kernel.astype(dtype), x.astype(dtype), g


def dots(jaxpr) -> list[tuple[str, str]]:
    """The operands' dtypes of all products of a jaxpr."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found.append(tuple(v.aval.dtype.name for v in eqn.invars))
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                    found += dots(inner)
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_all_three_products_have_operands_of_the_compute_dtype(dtype):
    kernel, x, g = operands(dtype)

    def backward(kernel, x):
        out, vjp = jax.vjp(vocab_logits, kernel, x)
        return out, vjp(g)

    assert dots(jax.make_jaxpr(backward)(kernel, x).jaxpr) == [(dtype, dtype)] * 3
    out, grads = backward(kernel, x)
    assert out.dtype == jnp.float32 and [leaf.dtype for leaf in grads] == [jnp.dtype(dtype)] * 2
    wide = [a.astype(jnp.float32) for a in (kernel, x)]
    expected = wide[1] @ wide[0].T, (g.T @ wide[1], g @ wide[0])
    for a, b in zip(jax.tree.leaves((out, grads)), jax.tree.leaves(expected), strict=True):
        assert float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max()) <= 2e-2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_wide_operands_give_the_numbers_of_lax(dtype):
    with jax.enable_x64(dtype == "float64"):
        kernel, x, g = operands(dtype)

        def plain(kernel, x):
            return jax.lax.dot_general(x, kernel, DIMS, preferred_element_type=x.dtype)

        for run in (lambda f: f(kernel, x), lambda f: jax.vjp(f, kernel, x)[1](g.astype(dtype))):
            for a, b in zip(jax.tree.leaves(run(vocab_logits)), jax.tree.leaves(run(plain)), strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("argnum", [0, 1])
def test_every_way_to_differentiate_works(argnum):
    """Forwards, backwards, linearized, in rows, recomputed, and with one operand a constant."""
    given = operands("bfloat16")
    direction = jnp.ones_like(given[argnum])

    def loss(leaf):
        kernel, x = (leaf if n == argnum else given[n] for n in (0, 1))
        return (dot_general(x, kernel, DIMS, preferred_element_type=jnp.float32) * given[2]).sum()

    gradient = jax.grad(loss)(given[argnum])
    along = (gradient.astype(jnp.float32) * direction.astype(jnp.float32)).sum()
    np.testing.assert_allclose(jax.jvp(loss, (given[argnum],), (direction,))[1], along, rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(jax.linearize(loss, given[argnum])[1](direction), along, rtol=2e-2, atol=2e-2)
    np.testing.assert_array_equal(jax.grad(jax.checkpoint(loss))(given[argnum]), gradient)
    np.testing.assert_array_equal(jax.vmap(jax.grad(loss))(given[argnum][None])[0], gradient)
    assert len(dots(jax.make_jaxpr(jax.grad(loss))(given[argnum]).jaxpr)) <= 2
