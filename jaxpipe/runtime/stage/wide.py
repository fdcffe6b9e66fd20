"""Gradients of weights in the dtype of their sums, read off the traced backward and retyped there.

`jax.vjp` gives the gradient of a bfloat16 leaf in bfloat16: the product that makes it adds up in float32 and rounds at
its end, in every microbatch, and the sum over microbatches reads it back. Here that product, and whatever only changes
the form of its result, is asked for the sum's dtype instead. Product and sum are then one kernel, and no microbatch's
gradient is rounded. Gradients made in another way (look-ups, loops, kernels of one's own) stay as they are.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.jax_internals import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jaxpipe.runtime.model import Tree

PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})
"""Primitives with a ``preferred_element_type``."""

FORMS = frozenset({"transpose", "reshape", "squeeze", "broadcast_in_dim", "rev", "copy", "neg", "slice"})
"""Primitives of one operand whose result has its dtype, and loses nothing by it."""

SUMS = frozenset({"add", "add_any", "concatenate", "pad", "reduce_sum"})
"""Primitives whose result is worth a wide dtype even where an operand is narrow."""

CALLS = frozenset({"jit", "pjit", "closed_call", "remat2", "checkpoint"})


def wide_gradients(backward: Callable, params: Tree, *args: Any, convert: bool = False) -> tuple[Tree, Any]:
    """What a backward returns, its weight gradients in the dtype of their sums where they can be.

    Args:
        backward: ``(params, *args) -> (gradients of params, others)``.
        params: Arrays.
        args: Arrays.
        convert: Convert the operands of products too: XLA for CPUs lacks some products of half precision with a wide
            result (jaxlib 0.10.2: ``Unsupported element type for DotThunk``) and converts the operands of others
            itself.

    Returns:
        The same. A gradient that could not be retyped has the dtype of its parameter.
    """
    if not any(_is_narrow(leaf.dtype) for leaf in jax.tree.leaves(params)):
        return backward(params, *args)
    closed, shapes = jax.make_jaxpr(backward, return_shape=True)(params, *args)
    run = jaxpr_as_fun(widened(closed, len(jax.tree.leaves(shapes[0])), convert))
    return jax.tree.unflatten(jax.tree.structure(shapes), run(*jax.tree.leaves((params, *args))))


def widened(closed: ClosedJaxpr, num: int, convert: bool = False) -> ClosedJaxpr:
    """A program whose first `num` outputs have the dtype of their sums, where they can; see `wide_gradients`."""
    wanted = [n < num for n in range(len(closed.jaxpr.outvars))]
    return ClosedJaxpr(_Retyping(closed.jaxpr, convert).outputs(wanted), closed.consts)


def wide_dtype(dtype: Any) -> Any:
    """float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


class _Retyping:
    """A program under change. An equation is replaced where its result is used once, by what is retyped too."""

    def __init__(self, jaxpr: Jaxpr, convert: bool):
        self.jaxpr, self.eqns, self.convert = jaxpr, list(jaxpr.eqns), convert
        self.before: dict[int, list[JaxprEqn]] = {}
        self.made_by = {var: n for n, eqn in enumerate(self.eqns) for var in eqn.outvars}
        operands = (v for eqn in self.eqns for v in eqn.invars)
        self.uses = Counter(v for v in (*operands, *jaxpr.outvars) if isinstance(v, Var))

    def outputs(self, wanted: Sequence[bool]) -> Jaxpr:
        """The program with those of its outputs wide that are wanted and can be."""
        outvars = [
            (self.wide(var) or var) if want else var for var, want in zip(self.jaxpr.outvars, wanted, strict=True)
        ]
        eqns = [eqn for n, own in enumerate(self.eqns) for eqn in (*self.before.get(n, ()), own)]
        info = self.jaxpr.debug_info.with_unknown_names()
        return self.jaxpr.replace(eqns=eqns, outvars=outvars, debug_info=info)

    def wide(self, var: Any) -> Any:
        """A wide variable in place of a narrow one, or None."""
        number = self.made_by.get(var) if isinstance(var, Var) else None
        if number is None or self.uses[var] > 1 or not _is_narrow(_dtype(var)):
            return None
        eqn = self.eqns[number]
        name, dtype = eqn.primitive.name, wide_dtype(_dtype(var))
        if name == "convert_element_type":
            source: Any = eqn.invars[0]
            return source if isinstance(source, Var) and _dtype(source) == dtype else None
        if name in PRODUCTS:
            invars = [self._converted(number, v, dtype) for v in eqn.invars] if self.convert else eqn.invars
            return self._replace(number, var, invars, eqn.params | {"preferred_element_type": jnp.dtype(dtype)})
        if name in FORMS:
            source = self.wide(eqn.invars[0])
            return source and self._replace(number, var, [source], eqn.params)
        if name in SUMS:
            sources = [self.wide(v) for v in eqn.invars]
            if not any(sources) and name != "reduce_sum":
                return None
            invars = [w or self._converted(number, v, dtype) for v, w in zip(eqn.invars, sources, strict=True)]
            return self._replace(number, var, invars, eqn.params)
        return self._in_call(number, var) if name in CALLS else None

    def _in_call(self, number: int, var: Var) -> Any:
        eqn = self.eqns[number]
        inner = eqn.params["jaxpr"]
        body = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
        at = eqn.outvars.index(var)
        body = _Retyping(body, self.convert).outputs([n == at for n in range(len(eqn.outvars))])
        if _dtype(body.outvars[at]) == _dtype(var):
            return None
        inner = ClosedJaxpr(body, inner.consts) if isinstance(inner, ClosedJaxpr) else body
        return self._replace(number, var, eqn.invars, eqn.params | {"jaxpr": inner})

    def _replace(self, number: int, var: Var, invars: Sequence, params: dict) -> Var:
        eqn, wide = self.eqns[number], _like(var)
        outvars = [wide if v is var else v for v in eqn.outvars]
        self.eqns[number] = eqn.replace(invars=list(invars), outvars=outvars, params=params)
        self.made_by[wide], self.uses[wide] = number, 1
        return wide

    def _converted(self, number: int, var: Any, dtype: Any) -> Any:
        """An operand of an equation, converted before it if it is narrow."""
        if not _is_narrow(_dtype(var)):
            return var
        if isinstance(var, Literal):
            return Literal(jnp.asarray(var.val, dtype), var.aval.update(dtype=jnp.dtype(dtype)))
        convert = jax.make_jaxpr(lambda x: x.astype(dtype))(jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype))
        (eqn,), wide = convert.jaxpr.eqns, _like(var)
        self.before.setdefault(number, []).append(eqn.replace(invars=[var], outvars=[wide]))
        return wide


def _is_narrow(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < jnp.dtype(wide_dtype(dtype)).itemsize


def _dtype(var: Any) -> Any:
    return var.aval.dtype


def _like(var: Any) -> Var:
    return Var(var.aval.update(dtype=jnp.dtype(wide_dtype(var.aval.dtype))))  # pyright: ignore
