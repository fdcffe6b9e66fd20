"""What a model's pieces weigh in the compiled loop: the numbers that `TickTable.bytes` multiplies."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.runtime.carry import join, part
from jaxpipe.runtime.compile import Program
from jaxpipe.runtime.ends import accumulator_dtype
from jaxpipe.runtime.heads import head_gradients, head_sums
from jaxpipe.runtime.mesh import FSDP
from jaxpipe.runtime.model import Tree
from jaxpipe.schedule import ModelBytes


def tree_bytes(tree: Tree, dtype=None) -> int:
    """Bytes of all leaves, optionally as if they had another dtype given by ``dtype(leaf.dtype)``."""
    return sum(
        math.prod(leaf.shape) * jnp.dtype(dtype(leaf.dtype) if dtype else leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def memory_of(compiled: Any) -> Any:
    """XLA's memory analysis of a compiled program, per device: ``temp_size_in_bytes`` and others.

    Raises:
        RuntimeError: The backend has none.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError("this backend reports no memory analysis")
    return analysis


def _head(program: Program, sums: Tree, head: Tree, carry: Tree) -> Any:
    """Loss of one microbatch and its gradients, the parameters' added to their sums."""
    mb = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), program.stages.stage.context.mb)
    floating, others = part(carry)
    joined, seed = partial(join, carry, others=others), jnp.ones((), accumulator_dtype(floating[0].dtype))
    return head_gradients(program.model.head_loss, head, floating, joined, mb, None, seed, sums)


def _copied_weights(program: Program, blocks: Tree) -> int:
    """The most weights that are there beside those at rest, in another dtype or gathered over `fsdp`."""
    fsdp = program.layout.shard == "params" and program.mesh.shape[FSDP] > 1

    def copied(weights: Tree, own: Tree, rests: Tree) -> int:
        leaves = zip(*(jax.tree.leaves(tree) for tree in (weights, own, rests)), strict=True)
        return tree_bytes(
            [cast for cast, kept, rest in leaves if cast.dtype != kept.dtype or (fsdp and rest.fsdp is not None)]
        )

    each = [copied(*of) for of in zip(program.stages.weights, blocks, program.rests, strict=True)]
    if program.hops_block:  # XLA's CPU backend makes one gather of all
        return sum(each)
    here = [window.repeats for window in program.windows]
    return max(sum(each[c] for c in a | b) for a, b in zip(here, [*here[1:], frozenset()], strict=True))


def model_bytes(program: Program, params: Tree) -> ModelBytes:
    """Bytes per device of the pieces of a program.

    Working memory is what the compiler reports for the largest of one stage's backward and the head, each compiled
    alone for one device.

    Args:
        program: The program.
        params: Shapes of the pipeline parameters.
    """
    stages, ends = program.stages, program.ends.local
    split = "I" in program.table.schedule.phases
    made = {id(branch.stage): branch.stage for branch in stages.branches}.values()
    lanes: list[tuple] = [(stage.backward, stage.backward_shapes) for stage in made]
    if split:
        lanes = [(stage.backward_input, stage.backward_shapes) for stage in made]
        lanes += [(stage.backward_weight, stage.backward_weight_shapes) for stage in made]
    head = jax.eval_shape(program.ends.head, ends)
    working = [memory_of(jax.jit(lane).lower(*given).compile()) for lane, given in lanes]
    lane = jax.jit(partial(_head, program), donate_argnums=0)
    working.append(memory_of(lane.lower(head_sums(head), head, stages.stage.carry).compile()))
    return ModelBytes(
        carry=tree_bytes(stages.stage.carry),
        residual=tree_bytes(stages.residuals.shapes),
        backward=max(
            lane.temp_size_in_bytes + lane.output_size_in_bytes - lane.alias_size_in_bytes for lane in working
        ),
        ends=tree_bytes(program.ends.moved),
        ends_gradient=tree_bytes(ends, accumulator_dtype),
        stage_gradient=sum(a.num_rows * tree_bytes(a.params, accumulator_dtype) for a in stages.accumulators),
        casts=_copied_weights(program, params["blocks"]),
        weight_residual=tree_bytes(stages.weight_residuals.shapes) if split else 0,
        gradient=tree_bytes(stages.stage.gradient),
    )
