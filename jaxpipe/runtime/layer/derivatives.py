"""What JAX's transformations make of a pipeline: `Pipeline.loss` with a derivative, programs that have none.

The compiled loop holds its own backwards and is never differentiated. So the loss has a rule: where a derivative is
asked for, the program of `Pipeline.value_and_grad` runs in place of the forward-only one, and the loss changes by the
inner product of its gradient with the change of the parameters. That is linear, which is all that both modes need.
A second derivative would have to go through the loop and is refused.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, linear_call

from jaxpipe.errors import ConfigError
from jaxpipe.runtime.layout.tree import Tree
from jaxpipe.runtime.stage.carry import has_gradient

TWICE = (
    "Pipeline.value_and_grad cannot be differentiated, and so Pipeline.loss has no second derivative "
    "(jax.hessian, jax.jvp of jax.grad); try jax.grad of Pipeline.loss for the first, "
    "jaxpipe.sequential(model).loss for the second"
)
"""What is said of the second derivative of a loss."""


def without_derivative(run: Callable, refusal: str = TWICE) -> Callable:
    """A program that runs as it is and refuses to be differentiated, in either mode.

    Args:
        run: The program, a function of arrays.
        refusal: What to say.

    Raises:
        ConfigError: When it is differentiated.
    """

    @jax.custom_jvp
    def guarded(*args):
        return run(*args)

    def refuse(primals, tangents):
        raise ConfigError(refusal)

    guarded.defjvp(refuse, symbolic_zeros=True)
    return guarded


def with_gradient(value: Callable, value_and_grad: Callable) -> Callable:
    """A loss that JAX differentiates with respect to its parameters, in either mode.

    Args:
        value: ``(params, batch, key) -> (loss, others)``. The others have no derivative: reverse mode refuses to go
            back through them, in forward mode it is NaN.
        value_and_grad: The same beside the gradient of the loss: ``-> ((loss, others), gradient)``.

    Returns:
        The function ``(params, batch, key)``.
    """
    both = jax.custom_jvp(value)

    def rule(primals, tangents):
        params, batch, key = primals
        dparams, dbatch, _ = tangents
        _refuse_batch(dbatch)
        out, gradient = value_and_grad(params, batch, key)
        moved = [(g, t) for g, t in zip(*map(_leaves, (gradient, dparams)), strict=True) if not _is_zero(t)]
        loss, others = out
        slope = sum((_inner(g, t, loss.dtype) for g, t in moved), jnp.zeros((), loss.dtype))
        return out, (slope, _unknown(others, [t for _, t in moved]))

    both.defjvp(rule, symbolic_zeros=True)
    return both


def _inner(gradient, tangent, dtype):
    """How much a loss changes with a leaf; JAX's gradient of a complex one is made for the real part."""
    return jnp.sum(jnp.real(gradient * tangent.astype(gradient.dtype)), dtype=dtype)


def _unknown(others: Tree, tangents: list) -> Tree:
    """The derivative of metrics and parts of a loss: nobody knows it."""
    floating = [leaf for leaf in jax.tree.leaves(others) if has_gradient(leaf)]

    def nobody_knows(_, tangents):
        return [jnp.full(leaf.shape, jnp.nan, leaf.dtype) for leaf in floating]

    def refuse(_, cotangents):
        raise ConfigError(
            "the metrics of Pipeline.loss(…, has_aux=True) and its parts but for the total have no gradient, only the "
            "loss has; try jax.grad(…, has_aux=True), or what they measure as part of head_loss.apply's loss_sum"
        )

    made = iter(linear_call(nobody_knows, refuse, (), tangents) if floating and tangents else [])

    def one(leaf):
        return next(made) if has_gradient(leaf) else jnp.zeros(leaf.shape, jax.dtypes.float0)

    return jax.tree.map(one, others)


def _refuse_batch(tangents: Tree) -> None:
    """Raises ConfigError where a derivative with respect to the batch is asked for."""
    for path, tangent in jax.tree.leaves_with_path(tangents, is_leaf=_is_zero):
        if not _is_zero(tangent):
            raise ConfigError(
                f"Pipeline.loss has no gradient with respect to batch{jax.tree_util.keystr(path)}, only to its "
                "parameters; try jax.lax.stop_gradient, or what is learnt as a parameter of the embedding"
            )


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _leaves(tree: Tree) -> list:
    return jax.tree.leaves(tree, is_leaf=_is_zero)
