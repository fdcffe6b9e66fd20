"""One stage as lane functions: forward, and backward from what forward kept, whole or in its I and W halves.

A stage is some blocks, unrolled or scanned over. Its backward is an explicit vjp taken here, never by differentiating
through the loop; what it keeps is decided in `jaxpipe.runtime.stage.residuals`, where it is cut in two in
`jaxpipe.runtime.stage.split`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.jax_internals import eval_jaxpr, jaxpr_as_fun
from jaxpipe.runtime.layout.tree import tie
from jaxpipe.runtime.model import Tree, carry_and_aux
from jaxpipe.runtime.stage import keys
from jaxpipe.runtime.stage.carry import join, part
from jaxpipe.runtime.stage.residuals import Cut, cut_residuals
from jaxpipe.runtime.stage.split import PRODUCTS, SplitBackward, split_backward
from jaxpipe.runtime.stage.wall import wall

Remat = Literal["full", "none", "all"] | Callable[..., Any]
"""``full``, ``none``, ``all``, or a policy of `jax.checkpoint`."""


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
class Run:
    """One block, or several alike that are scanned over.

    Attributes:
        apply: The blocks' apply function.
        ties: Leaves that live in the embedding: from paths in the block's parameters to paths there.
        count: None for one block, unrolled; else how many there are, their parameters stacked ``[count, ...]``.
    """

    apply: Callable
    ties: Mapping[str, str]
    count: int | None = None


@dataclass(frozen=True)
class Stage:
    """The lane functions of a stage.

    Gradients of a carry are lists of its floating-point leaves (`jaxpipe.runtime.stage.carry`); `aux` is a dict of the
    sums of what the blocks return as aux, with all names that any block of the model has.

    Attributes:
        runs: The blocks.
        remat: What a forward keeps, see `Pipeline`.
        params: Shapes of the parameters as the lanes see them: ``{"blocks": one tree per run, "shared": the leaves of
            the embedding that blocks use}``.
        carry: Shapes of the stage's input.
        context: Shapes of the context.
        aux: Shapes of `aux`.
        walls: Whether there is a wall after each block, see `jaxpipe.runtime.stage.wall`.
    """

    runs: Sequence[Run]
    remat: Remat
    params: Tree
    carry: Tree
    context: Context
    aux: Mapping[str, jax.ShapeDtypeStruct] = field(default_factory=dict)
    walls: bool = False

    def run(self, params: Tree, carry: Tree, context: Context) -> tuple[Tree, dict]:
        """The blocks, one after the other: the output carry and `aux`."""
        total = {name: jnp.zeros(s.shape, s.dtype) for name, s in self.aux.items()}
        number = context.first_block
        never = jnp.minimum(number, 0)
        for run, own in zip(self.runs, params["blocks"], strict=True):

            def one(total, carry, number, own, run=run):
                own = tie(own, params["shared"], run.ties)
                key = keys.block_key(context.group, number)
                carry, aux = carry_and_aux(carry, self._remembering(run.apply)(own, carry, context.mb, key))
                return total | {name: total[name] + x.astype(total[name].dtype) for name, x in aux.items()}, carry

            if run.count is None:
                total, carry = one(total, carry, number, own)
            else:
                numbers = number + jnp.arange(run.count, dtype=jnp.int32)
                (total, carry), _ = lax.scan(lambda s, x, one=one: (one(*s, *x), None), (total, carry), (numbers, own))
            if self.walls:
                floating, others = part(carry)
                carry = join(carry, wall(never, floating), others)
            number = number + (run.count or 1)
        return carry, total

    def _remembering(self, apply: Callable) -> Callable:
        """A block that keeps for its backward what the policy says."""
        if self.remat == "none":
            return jax.checkpoint(apply, policy=save_products, prevent_cse=False)
        return jax.checkpoint(apply, policy=self.remat, prevent_cse=False) if callable(self.remat) else apply

    @cached_property
    def gradient(self) -> list:
        """Shapes of the gradient of a carry."""
        return part(self.carry)[0]

    @cached_property
    def residuals(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes of what a forward keeps beside the stage's input."""
        if self.remat == "full":
            return []
        return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in self._cut.kept]  # pyright: ignore

    def forward(self, params: Tree, carry: Tree, context: Context) -> tuple[Tree, dict, list]:
        """Runs the stage.

        Returns:
            The output carry, `aux`, and the residuals.
        """
        if self.remat == "full":
            return *self.run(params, carry, context), []
        cut = self._cut
        floating, others = part(carry)
        outs = eval_jaxpr(cut.forward, cut.consts, *jax.tree.leaves((params, floating, others, context)))
        first_aux = len(floating)
        first_other = first_aux + len(self.aux)
        y = join(self.carry, outs[:first_aux], outs[first_other : cut.num_outputs])
        aux = dict(zip(sorted(self.aux), outs[first_aux:first_other], strict=True))  # as JAX orders the keys
        return y, aux, outs[cut.num_outputs :]

    def backward(
        self, params: Tree, carry: Tree, residuals: list, context: Context, dy: list, daux: dict
    ) -> tuple[Tree, list]:
        """Gradients of the weights and of the input.

        Args:
            params: The blocks' parameters.
            carry: The stage's input.
            residuals: What `forward` returned.
            context: The context that `forward` had.
            dy: Gradient of the output.
            daux: Gradient of `aux`.

        Returns:
            ``(dparams, dcarry)``.
        """
        floating, others = part(carry)
        if self.remat == "full":
            _, vjp, _ = jax.vjp(partial(self._run_parts, others, context), params, floating, has_aux=True)
            return vjp((dy, daux))
        return self._cut.vjp(residuals, jax.tree.leaves((params, floating, others, context)))((dy, daux))

    @property
    def weight_residuals(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes of what I keeps for W beside the stage's input and residuals."""
        return self._split.crossing

    def backward_input(
        self, params: Tree, carry: Tree, residuals: list, context: Context, dy: list, daux: dict
    ) -> tuple[list, list]:
        """The I half of `backward`: ``(dcarry, weight residuals)``."""
        outs = jaxpr_as_fun(self._split.inputs)(*jax.tree.leaves((params, carry, residuals, context, dy, daux)))
        return list(outs[: self._split.num_inputs]), list(outs[self._split.num_inputs :])

    def backward_weight(self, params: Tree, carry: Tree, residuals: list, context: Context, crossing: list) -> Tree:
        """The W half of `backward`: ``dparams``, from what `backward_input` kept."""
        args = jax.tree.leaves((params, carry, residuals, context, crossing))
        return jax.tree.unflatten(jax.tree.structure(params), jaxpr_as_fun(self._split.weights)(*args))

    def _run_parts(self, others: list, context: Context, params: Tree, floating: list):
        """`run` as a function of what has gradients: ``((outputs, aux), the other outputs)``."""
        y, aux = self.run(params, join(self.carry, floating, others), context)
        outs, other_outs = part(y)
        return (outs, aux), other_outs

    @cached_property
    def _split(self) -> SplitBackward:
        closed = jax.make_jaxpr(self.backward)(*self.backward_shapes)
        arriving = len(self.gradient) + len(self.aux)
        return split_backward(closed, len(jax.tree.leaves(self.params)), arriving)

    @property
    def backward_shapes(self) -> tuple:
        """Shapes of the arguments of `backward` and `backward_input`."""
        return self.params, self.carry, self.residuals, self.context, self.gradient, dict(self.aux)

    @property
    def backward_weight_shapes(self) -> tuple:
        """Shapes of the arguments of `backward_weight`."""
        return self.params, self.carry, self.residuals, self.context, self.weight_residuals

    @cached_property
    def _cut(self) -> Cut:
        found = {}

        def traced(params, floating, others, context):
            run = partial(self._run_parts, others, context)
            (y, aux), vjp, other = jax.vjp(run, params, floating, has_aux=True)
            leaves, found["tree"] = jax.tree.flatten(vjp)
            return [*y, *jax.tree.leaves(aux), *other], leaves

        floating, others = part(self.carry)
        closed = jax.make_jaxpr(traced)(self.params, floating, others, self.context)
        counts = [len(jax.tree.leaves(part)) for part in (self.params, floating, (others, self.context))]
        num_outputs = len(floating) + len(self.aux) + len(others)
        return cut_residuals(closed, counts, num_outputs, found["tree"], self.remat == "all")
