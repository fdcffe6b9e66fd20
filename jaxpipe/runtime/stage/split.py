"""A stage's backward cut in two: I makes the gradient of the input, W the gradients of the weights.

Read off the traced backward, once: what the input's gradient needs is I. W is what remains, and reads from I what it
must not compute again: the outputs of matrix products and opaque kernels, and the gradient that arrived. Those cross
from I to W in a slot of their own, the *weight-residual*. Elementwise work that both need is computed in both: keeping
it would cost more memory than time. With full remat the forward runs again in I only, and its products cross.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxpipe.jax_internals import ClosedJaxpr, Jaxpr, Literal, Var, dce_jaxpr, eval_jaxpr

PRODUCTS = frozenset(
    {
        "dot_general",
        "ragged_dot",
        "ragged_dot_general",
        "conv_general_dilated",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
        "pallas_call",
        "ffi_call",
        "dot_product_attention_fwd",
        "dot_product_attention_fwd_wrapper",
        "dot_product_attention_bwd",
        "dot_product_attention_bwd_wrapper",
        "name",
    }
)
"""Primitives whose outputs ``remat="none"`` keeps: matrix products, opaque kernels that may hold them, and what a model
marks with `jax.ad_checkpoint.checkpoint_name`."""

INLINED = ("pjit", "jit", "closed_call", "remat2", "checkpoint", "custom_jvp_call")
OPAQUE = PRODUCTS | {"scan", "while", "cond", "shard_map"}
OPAQUE |= {"dot_product_attention_bwd", "dot_product_attention_bwd_wrapper"}
"""What is never run twice: its outputs cross from I to W."""


@dataclass(frozen=True)
class SplitBackward:
    """The two halves of a backward.

    Attributes:
        inputs: ``arguments -> input gradient, crossing``.
        weights: ``arguments without the arriving gradient, crossing -> weight gradients``.
        crossing: Shapes of the weight-residual.
        num_inputs: Leaves of the input gradient.
    """

    inputs: ClosedJaxpr
    weights: ClosedJaxpr
    crossing: list[jax.ShapeDtypeStruct]
    num_inputs: int


def split_backward(closed: ClosedJaxpr, num_weights: int, num_arriving: int) -> SplitBackward:
    """Cuts a traced backward.

    Args:
        closed: ``(arguments, arriving gradient) -> (weight gradients, input gradient)``.
        num_weights: Leaves of the weight gradients.
        num_arriving: Leaves of the arriving gradient.
    """
    closed = inline(closed)
    jaxpr = closed.jaxpr
    weights, inputs = jaxpr.outvars[:num_weights], jaxpr.outvars[num_weights:]
    arriving = jaxpr.invars[len(jaxpr.invars) - num_arriving :]
    done_by_inputs = {id(eqn) for eqn in _needed(jaxpr, inputs, stop=set())}
    stop = {
        var for eqn in jaxpr.eqns if id(eqn) in done_by_inputs and eqn.primitive.name in OPAQUE for var in eqn.outvars
    } | set(arriving)
    rest = _needed(jaxpr, weights, stop)
    read = {var for eqn in rest for var in eqn.invars if isinstance(var, Var)}
    read |= {var for var in weights if isinstance(var, Var)}
    crossing = [var for var in (*arriving, *(v for eqn in jaxpr.eqns for v in eqn.outvars)) if var in read & stop]
    info = jaxpr.debug_info.with_unknown_names()
    inputs_program = _only(jaxpr.replace(outvars=[*inputs, *crossing], debug_info=info))
    kept = [var for var in jaxpr.invars if var not in arriving]
    weights_program = _only(jaxpr.replace(invars=[*kept, *crossing], outvars=list(weights), eqns=rest, debug_info=info))
    return SplitBackward(
        ClosedJaxpr(inputs_program, closed.consts),
        ClosedJaxpr(weights_program, closed.consts),
        [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in crossing],  # pyright: ignore
        len(inputs),
    )


def inline(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The same program without calls: what is inside them stands in its place."""
    return jax.make_jaxpr(lambda *args: _run(closed.jaxpr, closed.consts, args))(*closed.in_avals)


def _run(jaxpr: Jaxpr, consts: Sequence, args: Sequence) -> list:
    env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
        if eqn.primitive.name in INLINED and inner is not None:
            body, body_consts = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
            outs = _run(body, body_consts, values)
        else:
            given = {v: x for v, x in zip(eqn.invars, values, strict=True) if not isinstance(v, Literal)}
            info = jaxpr.debug_info.with_unknown_names()
            single = jaxpr.replace(constvars=[], invars=list(given), outvars=eqn.outvars, eqns=[eqn], debug_info=info)
            outs = eval_jaxpr(single, (), *given.values())
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _needed(jaxpr: Jaxpr, outvars: Sequence, stop: set) -> list:
    """The equations that make `outvars` from the inputs and from the variables in `stop`."""
    wanted = {var for var in outvars if isinstance(var, Var)} - stop
    found = []
    for eqn in reversed(jaxpr.eqns):
        if wanted.intersection(eqn.outvars):
            found.append(eqn)
            wanted |= {var for var in eqn.invars if isinstance(var, Var)} - stop
    return found[::-1]


def _only(jaxpr: Jaxpr) -> Jaxpr:
    return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)[0]
