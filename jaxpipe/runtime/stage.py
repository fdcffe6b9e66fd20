"""One stage as two lane functions: forward, and backward from what forward kept.

A stage is k blocks, unrolled. Its backward is an explicit vjp taken here, never by differentiating through the loop.
What the backward needs is cut into three by dependence, read off the traced program:

    the stage's input            kept once, in an activation slot, whatever the policy
    from weights and batch only  computed again where it is needed, never kept: no slot holds a weight or its cast
    the rest                     the residuals: kept in a residual slot, each value once
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend.core import ClosedJaxpr, Jaxpr, Var, jaxpr_as_fun
from jax.extend.core import Literal as Constant
from jax.interpreters import partial_eval

from jaxpipe.runtime import keys
from jaxpipe.runtime.model import Tree
from jaxpipe.runtime.split import PRODUCTS, SplitBackward, split_backward

Remat = Literal["full", "none", "all"]


def save_products(primitive, *_, **__) -> bool:
    """A `jax.checkpoint` policy: keep what a matrix product or an opaque kernel made, compute the rest again."""
    return primitive.name in PRODUCTS


@dataclass(frozen=True)
class Context:
    """What a lane knows beside weights and activations.

    Attributes:
        mb: The batch cut to the microbatch.
        group: The key of the row group, or None.
        first_block: Global number of the stage's first block, an int32 scalar.
    """

    mb: Tree
    group: Any
    first_block: Any


jax.tree_util.register_dataclass(Context)


@dataclass(frozen=True)
class Stage:
    """The lane functions of a stage of k blocks.

    Attributes:
        applies: The k blocks' apply functions.
        remat: ``full`` keeps only the stage's input; ``none`` keeps the matrix products' outputs and computes no
            product again; ``all`` keeps every residual of the vjp.
        params: Shapes of the k blocks' parameters, as the lanes see them.
        carry: Shapes of the stage's input.
        context: Shapes of the context.
    """

    applies: Sequence[Callable]
    remat: Remat
    params: Tree
    carry: Tree
    context: Context

    def run(self, params: Tree, carry: Tree, context: Context) -> Tree:
        """The k blocks, one after the other."""
        for j, apply in enumerate(self.applies):
            if self.remat == "none":
                apply = jax.checkpoint(apply, policy=save_products, prevent_cse=False)
            carry = apply(params[j], carry, context.mb, keys.block_key(context.group, context.first_block + j))
        return carry

    @cached_property
    def residuals(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes of what a forward keeps beside the stage's input."""
        if self.remat == "full":
            return []
        return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in self._cut.kept]  # pyright: ignore

    def forward(self, params: Tree, carry: Tree, context: Context) -> tuple[Tree, list]:
        """Runs the stage.

        Returns:
            The output carry and the residuals.
        """
        if self.remat == "full":
            return self.run(params, carry, context), []
        cut = self._cut
        outs = eval_jaxpr(cut.forward, cut.consts, *jax.tree.leaves((params, carry, context)))
        y = jax.tree.unflatten(jax.tree.structure(self.carry), outs[: cut.num_outputs])
        return y, outs[cut.num_outputs :]

    def backward(self, params: Tree, carry: Tree, residuals: list, context: Context, dy: Tree) -> tuple[Tree, Tree]:
        """Gradients of the weights and of the input.

        Args:
            params: The k blocks' parameters.
            carry: The stage's input.
            residuals: What `forward` returned.
            context: The context that `forward` had.
            dy: Gradient of the output.

        Returns:
            ``(dparams, dcarry)``.
        """
        if self.remat == "full":
            _, vjp = jax.vjp(lambda p, x: self.run(p, x, context), params, carry)
            return vjp(dy)
        return self._cut.vjp(residuals, jax.tree.leaves((params, carry, context)))(dy)

    @property
    def weight_residuals(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes of what I keeps for W beside the stage's input and residuals."""
        return self._split.crossing

    def backward_input(self, params: Tree, carry: Tree, residuals: list, context: Context, dy: Tree) -> tuple:
        """The I half of `backward`: ``(dcarry, weight residuals)``."""
        args = jax.tree.leaves((params, carry, residuals, context, dy))
        outs = jaxpr_as_fun(self._split.inputs)(*args)
        at = self._split.num_inputs
        return jax.tree.unflatten(jax.tree.structure(carry), outs[:at]), list(outs[at:])

    def backward_weight(self, params: Tree, carry: Tree, residuals: list, context: Context, crossing: list) -> Tree:
        """The W half of `backward`: ``dparams``, from what `backward_input` kept."""
        args = jax.tree.leaves((params, carry, residuals, context, crossing))
        return jax.tree.unflatten(jax.tree.structure(params), jaxpr_as_fun(self._split.weights)(*args))

    @cached_property
    def _split(self) -> SplitBackward:
        args = self.params, self.carry, self.residuals, self.context, self.carry
        closed = jax.make_jaxpr(self.backward)(*args)
        return split_backward(closed, len(jax.tree.leaves(self.params)), len(jax.tree.leaves(self.carry)))

    @cached_property
    def _cut(self) -> "Cut":
        found = {}

        def traced(params, carry, context):
            y, vjp = jax.vjp(lambda p, x: self.run(p, x, context), params, carry)
            leaves, found["tree"] = jax.tree.flatten(vjp)
            return jax.tree.leaves(y), leaves

        closed = jax.make_jaxpr(traced)(self.params, self.carry, self.context)
        counts = [len(jax.tree.leaves(part)) for part in (self.params, self.carry, self.context)]
        return cut_residuals(closed, counts, len(jax.tree.leaves(self.carry)), found["tree"], self.remat == "all")


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
        counts: Leaves of params, of carry, of context.
        num_outputs: How many outputs stand before the leaves.
        tree: Structure of the vjp function.
        keep_random: Keep what depends on random keys (dropout masks) instead of drawing it again.
    """
    jaxpr = closed.jaxpr
    inputs = {var: i for i, var in enumerate(jaxpr.invars)}
    first_carry, first_context = counts[0], counts[0] + counts[1]
    depends: dict[Var, frozenset[str]] = dict.fromkeys(jaxpr.constvars, frozenset())
    for var, i in inputs.items():
        random = jax.dtypes.issubdtype(var.aval.dtype, jax.dtypes.prng_key)  # pyright: ignore
        role = "weights" if i < first_carry else "carry" if i < first_context else "random" if random else "batch"
        depends[var] = frozenset({role})
    for eqn in jaxpr.eqns:
        role = frozenset().union(*(depends[v] for v in eqn.invars if isinstance(v, Var)))
        depends.update(dict.fromkeys(eqn.outvars, role))

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


def _is_key(var: Var) -> bool:
    return jax.dtypes.issubdtype(var.aval.dtype, jax.dtypes.prng_key)  # pyright: ignore


def _only(jaxpr: Jaxpr, outvars: list) -> Jaxpr:
    """The part of a program that makes the given outputs, with the same inputs."""
    wanted = jaxpr.replace(outvars=outvars, debug_info=jaxpr.debug_info.with_unknown_names())
    return partial_eval.dce_jaxpr(wanted, [True] * len(outvars), instantiate=True)[0]


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
                eqn.primitive.name in ("pjit", "jit", "remat2", "checkpoint", "closed_call", "custom_jvp_call")
                and inner
            ):
                body = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
                found.add(_only_cast(body, body.invars[at]))
            else:
                return None
    return found.pop() if len(found) == 1 else None
