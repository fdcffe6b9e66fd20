"""What a model's pieces weigh in the compiled loop: the numbers that `TickTable.bytes` multiplies."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.runtime.compile import Program
from jaxpipe.runtime.ends import accumulator_dtype
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


def model_bytes(program: Program, params: Tree) -> ModelBytes:
    """Bytes per device of the pieces of a program.

    Working memory of a backward is what the compiler reports for one stage's backward alone, compiled for one device.

    Args:
        program: The program.
        params: Shapes of the pipeline parameters.
    """
    stage, repeats = program.stage, program.table.schedule.repeats
    ends = dict(program.ends.shapes)
    args = stage.params, stage.carry, stage.residuals, stage.context, stage.carry
    lanes: list[tuple] = [(stage.backward, args)]
    if "I" in program.table.schedule.phases:
        lanes = [(stage.backward_input, args), (stage.backward_weight, (*args[:-1], stage.weight_residuals))]
    working = [memory_of(jax.jit(lane).lower(*given).compile()) for lane, given in lanes]
    leaves = zip(jax.tree.leaves(stage.params), jax.tree.leaves(params["blocks"][0]), strict=True)
    casts = tree_bytes([cast for cast, rest in leaves if cast.dtype != rest.dtype])
    return ModelBytes(
        carry=tree_bytes(stage.carry),
        residual=tree_bytes(stage.residuals),
        backward=max(lane.temp_size_in_bytes + lane.output_size_in_bytes for lane in working),
        ends=tree_bytes(ends),
        ends_gradient=tree_bytes(ends, accumulator_dtype),
        stage_gradient=repeats * tree_bytes(stage.params, accumulator_dtype),
        casts=repeats * casts,
        weight_residual=tree_bytes(stage.weight_residuals) if len(lanes) > 1 else 0,
    )
