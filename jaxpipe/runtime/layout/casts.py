"""Which parameters a lane uses in a smaller dtype only: those are cast once per step, not in every lane."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.jax_internals import ClosedJaxpr, Jaxpr, Var
from jaxpipe.runtime.layout.tree import Tree, get_path, set_path, tie, untie
from jaxpipe.runtime.model import Model


def cast_dtypes(run: Callable, params: Tree, *args) -> Tree:
    """The dtype that each parameter is cast to wherever it is used, or its own if it is used in any other way.

    A parameter that is only ever cast to a smaller dtype can be cast once per step instead of in every lane. Casting
    commutes with the gradient, so the numbers stay the same.

    Args:
        run: ``(params, *args) -> outputs``.
        params: Shapes of the parameters.
        args: Shapes of the other arguments.

    Returns:
        A tree of dtypes like `params`.
    """
    closed = jax.make_jaxpr(run)(params, *args)
    leaves, tree = jax.tree.flatten(params)
    dtypes = [
        _only_cast(closed.jaxpr, var) or leaf.dtype for var, leaf in zip(closed.jaxpr.invars, leaves, strict=False)
    ]
    smaller = [
        new if jnp.dtype(new).itemsize < jnp.dtype(leaf.dtype).itemsize else leaf.dtype
        for new, leaf in zip(dtypes, leaves, strict=True)
    ]
    casted = [jax.ShapeDtypeStruct(leaf.shape, dtype) for leaf, dtype in zip(leaves, smaller, strict=True)]
    same = _out_avals(jax.eval_shape(run, jax.tree.unflatten(tree, casted), *args)) == _out_avals(
        jax.eval_shape(run, params, *args)
    )
    return jax.tree.unflatten(tree, smaller if same else [leaf.dtype for leaf in leaves])


def _out_avals(outs: Tree) -> list:
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(outs)]


def _only_cast(jaxpr: Jaxpr, var: Var) -> Any:
    """The one dtype that all uses of `var` cast it to, else None."""
    found = set()
    if var in jaxpr.outvars:
        return None
    for eqn in jaxpr.eqns:
        for at, operand in enumerate(eqn.invars):
            if operand is not var:
                continue
            inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
            if eqn.primitive.name == "convert_element_type":
                found.add(jnp.dtype(eqn.params["new_dtype"]))
            elif (
                eqn.primitive.name
                in ("pjit", "jit", "remat2", "checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call")
                and inner
            ):
                body = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
                found.add(_only_cast(body, body.invars[at]))
            else:
                return None
    return found.pop() if len(found) == 1 else None


def end_dtypes(model: Model, ends: Tree, carry: Tree, mb: Tree, key) -> Tree:
    """The dtypes that embedding and head compute with; a tied leaf keeps its own unless all agree.

    Args:
        model: The model.
        ends: Shapes of ``{"embed", "head"}``.
        carry: Shapes of what the head is given.
        mb: Shapes of a microbatch.
        key: Shape of a key.
    """
    head = tie(ends["head"], ends["embed"], model.head_tie)
    embed = cast_dtypes(model.embed.apply, ends["embed"], mb, key)
    head = cast_dtypes(model.head_loss.apply, head, carry, mb, key)
    for to, source in model.head_tie.items():
        if get_path(head, to) != get_path(embed, source):
            embed = set_path(embed, source, get_path(ends["embed"], source).dtype)
    for kind in {block.kind for block in model.blocks}:
        for source in model.block_tie(kind).values():
            embed = set_path(embed, source, get_path(ends["embed"], source).dtype)
    return {"embed": embed, "head": untie(head, model.head_tie)}
