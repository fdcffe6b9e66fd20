"""What a backward needs from its forward, cut into three by dependence, read off the traced program.

    the stage's input            kept once, in an activation slot, whatever the policy
    from weights and batch only  computed again where it is needed, never kept: no slot holds a weight or its cast
    the rest                     the residuals: kept in a residual slot, each value once

Leaves of the carry that have no gradient count as batch: the backward finds them in the activation slot.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxpipe.jax_internals import ClosedJaxpr, Jaxpr, Literal as Constant, Var, dce_jaxpr, eval_jaxpr, scan_counts
from jaxpipe.runtime.model import Tree

Roles = frozenset[str]
"""What a value depends on: some of weights, carry, batch, random."""

CALLS = ("pjit", "jit", "closed_call", "remat2", "checkpoint")


@dataclass(frozen=True)
class Cut:
    """A traced vjp, cut into what is kept and what is computed again.

    Attributes:
        forward: ``inputs -> outputs, kept``.
        again: ``inputs -> values`` that depend on weights and batch only.
        kept: Variables whose values go to a residual slot.
        sources: For each leaf of the vjp, where it comes from: ("input", i), ("kept", i), ("again", i) or
            ("constant", value).
    """

    forward: Jaxpr
    again: Jaxpr
    consts: list
    kept: list[Var]
    sources: list[tuple[str, Any]]
    tree: Any
    num_outputs: int

    def vjp(self, kept: list, inputs: list) -> Callable[[Tree], tuple[Tree, Tree]]:
        """Puts the vjp function together from kept values and the lane's own inputs."""
        again = eval_jaxpr(self.again, self.consts, *inputs)
        by_kind = {"input": inputs, "kept": kept, "again": again}
        leaves = [at if kind == "constant" else by_kind[kind][at] for kind, at in self.sources]
        return jax.tree.unflatten(self.tree, leaves)


def cut_residuals(closed: ClosedJaxpr, counts: list[int], num_outputs: int, tree, keep_random: bool) -> Cut:
    """Classifies the leaves of a traced vjp by what they depend on.

    Args:
        closed: ``(params, carry, context) -> (outputs, leaves)``.
        counts: Leaves of params, of the carry with gradients, and of everything else.
        num_outputs: How many outputs stand before the leaves.
        tree: Structure of the vjp function.
        keep_random: Keep what depends on random keys (dropout masks) instead of drawing it again.
    """
    jaxpr = closed.jaxpr
    inputs = {var: i for i, var in enumerate(jaxpr.invars)}
    first_carry, first_context = counts[0], counts[0] + counts[1]
    roles: list[Roles] = []
    for var, i in inputs.items():
        random = jax.dtypes.issubdtype(var.aval.dtype, jax.dtypes.prng_key)  # pyright: ignore
        role = "weights" if i < first_carry else "carry" if i < first_context else "random" if random else "batch"
        roles.append(frozenset({role}))
    depends = dependence(jaxpr, roles)
    kept: dict[Var, int] = {}
    again: dict[Var, int] = {}
    sources: list[tuple[str, Any]] = []
    for leaf in jaxpr.outvars[num_outputs:]:
        if isinstance(leaf, Constant):
            sources.append(("constant", leaf.val))
        elif leaf in inputs:
            sources.append(("input", inputs[leaf]))
        elif "carry" in depends[leaf] or (keep_random and "random" in depends[leaf] and not _is_key(leaf)):
            sources.append(("kept", kept.setdefault(leaf, len(kept))))
        else:
            sources.append(("again", again.setdefault(leaf, len(again))))
    outputs = jaxpr.outvars[:num_outputs]
    return Cut(
        forward=_only(jaxpr, [*outputs, *kept]),
        again=_only(jaxpr, list(again)),
        consts=list(closed.consts),
        kept=list(kept),
        sources=sources,
        tree=tree,
        num_outputs=num_outputs,
    )


def dependence(jaxpr: Jaxpr, roles: Sequence[Roles]) -> dict[Var, Roles]:
    """The roles of the inputs that each variable of a program depends on.

    Args:
        jaxpr: The program.
        roles: Of each of its inputs.
    """
    found: dict[Var, Roles] = dict.fromkeys(jaxpr.constvars, frozenset()) | dict(zip(jaxpr.invars, roles, strict=True))
    for eqn in jaxpr.eqns:
        known = [found[v] if isinstance(v, Var) else frozenset() for v in eqn.invars]
        inner = eqn.params.get("jaxpr")
        body: Any = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
        if eqn.primitive.name == "scan":
            outs = _scan_dependence(body, known, *scan_counts(eqn))
        elif eqn.primitive.name in CALLS and isinstance(body, Jaxpr):
            outs = _out_dependence(body, known)
        else:
            outs = [frozenset().union(*known)] * len(eqn.outvars)
        found.update(zip(eqn.outvars, outs, strict=True))
    return found


def _out_dependence(jaxpr: Jaxpr, roles: Sequence[Roles]) -> list[Roles]:
    found = dependence(jaxpr, roles)
    return [found[v] if isinstance(v, Var) else frozenset() for v in jaxpr.outvars]


def _scan_dependence(body: Jaxpr, known: list[Roles], num_consts: int, num_carry: int) -> list[Roles]:
    """What a loop carries may depend, after some turns, on all that any turn brings in."""
    consts, carry, xs = known[:num_consts], known[num_consts:][:num_carry], known[num_consts + num_carry :]
    while True:
        outs = _out_dependence(body, [*consts, *carry, *xs])
        grown = [a | b for a, b in zip(carry, outs[:num_carry], strict=True)]
        if grown == carry:
            return outs
        carry = grown


def _is_key(var: Var) -> bool:
    return jax.dtypes.issubdtype(var.aval.dtype, jax.dtypes.prng_key)  # pyright: ignore


def _only(jaxpr: Jaxpr, outvars: list) -> Jaxpr:
    """The part of a program that makes the given outputs, with the same inputs."""
    wanted = jaxpr.replace(outvars=outvars, debug_info=jaxpr.debug_info.with_unknown_names())
    return dce_jaxpr(wanted, [True] * len(outvars), instantiate=True)[0]
