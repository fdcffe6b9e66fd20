"""What a model's pieces weigh in the compiled loop: the numbers that `TickTable.bytes` multiplies.

Pieces are compiled one by one for the devices of the pipeline's mesh, which need not be there: what a lane needs on a
GPU says nothing about a CPU, nor the other way round.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from jaxpipe.runtime.layout.mesh import AXES, FSDP, TENSOR, manual_axes
from jaxpipe.runtime.layout.rest import Rest
from jaxpipe.runtime.loop.compile import Program
from jaxpipe.runtime.model import Tree
from jaxpipe.runtime.stage.carry import join, part
from jaxpipe.runtime.stage.ends import accumulate, accumulator_dtype, shared_leaves
from jaxpipe.runtime.stage.heads import head_gradients, head_sums
from jaxpipe.runtime.stage.pool import Pool, key_of
from jaxpipe.runtime.stage.stage import Stage
from jaxpipe.runtime.stage.wide import wide_gradients
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


@dataclass(frozen=True)
class Share:
    """The devices that share one stage: one, or those of the axis `tensor`. Lanes are compiled for them alone.

    Attributes:
        mesh: The same axes as the pipeline's, one place on each but `tensor`.
    """

    mesh: Mesh

    @classmethod
    def of(cls, mesh: Mesh) -> "Share":
        """Some place of a pipeline's mesh, of this process if it has any."""
        grid = np.moveaxis(mesh.devices, mesh.axis_names.index(TENSOR), -1) if TENSOR in mesh.shape else mesh.devices
        rows = grid.reshape(-1, mesh.shape.get(TENSOR, 1))
        own = [row for row in rows if row[0].process_index == jax.process_index()]
        return cls(Mesh((own or list(rows))[0].reshape(1, 1, 1, -1), AXES, axis_types=(AxisType.Auto,) * len(AXES)))

    @property
    def size(self) -> int:
        """How many devices share."""
        return self.mesh.shape[TENSOR]

    def body(self, lane: Callable) -> Callable:
        """A lane that finds around it what it finds in the compiled loop."""
        axes: Any = manual_axes(self.mesh)
        whole = PartitionSpec()
        return jax.shard_map(lane, mesh=self.mesh, in_specs=whole, out_specs=whole, axis_names=axes, check_vma=False)

    def compiled(self, lane: Callable, shapes: Sequence[Tree], rests: Sequence[Tree] = (), adds: bool = False) -> Any:
        """A lane by itself.

        Args:
            lane: The function.
            shapes: Of its arguments; where they have a sharding, it is theirs.
            rests: How the first of them lie over `tensor`; the others lie whole.
            adds: Whether it changes its first argument in place.
        """

        def put(s, spec: PartitionSpec):
            return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(self.mesh, spec))

        cut = [
            jax.tree.map(lambda s, rest: put(s, rest.spec((TENSOR,))), tree, rest)
            for tree, rest in zip(shapes, rests, strict=False)
        ]
        others = tuple(shapes[len(cut) :])
        whole = jax.tree.map(lambda s: put(s, PartitionSpec()) if s.sharding is None else s, others)
        return jax.jit(self.body(lane), donate_argnums=0 if adds else ()).lower(*cut, *whole).compile()

    def trace(self, stages: Sequence[Stage], split: bool = True) -> None:
        """Traces what stages keep, which they remember, as in the loop: it may depend on the devices."""

        def kept():
            for stage in stages:
                _ = stage.residuals, stage.weight_residuals if split else None

        jax.eval_shape(self.body(kept))

    def bytes(self, shapes: Tree, rests: Tree, dtype=None) -> int:
        """Bytes of parameters, or of what is shaped like them, on one device."""
        pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(rests), strict=True)
        return sum(tree_bytes(s, dtype) // (1 if rest.tensor is None else self.size) for s, rest in pairs)

    def carry_bytes(self, carry: Tree, spec: PartitionSpec) -> int:
        """Bytes of a carry, or its gradient, on one device, see `Device.lay`."""

        def fits(s) -> bool:
            return len(s.shape) >= len(spec) and not any(s.shape[n] % self.size for n, axis in enumerate(spec) if axis)

        cut = any(spec)
        return sum(tree_bytes(s) // (self.size if cut and fits(s) else 1) for s in jax.tree.leaves(carry))


def _head(program: Program, sums: Tree, head: Tree, carry: Tree) -> Any:
    """Loss of one microbatch and its gradients, the parameters' added to their sums."""
    mb = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), program.stages.stage.context.mb)
    floating, others = part(carry)
    joined, seed = partial(join, carry, others=others), jnp.ones((), accumulator_dtype(floating[0].dtype))
    return head_gradients(program.model.head_loss, head, floating, joined, mb, None, seed, sums)


def _weights_alone(stage: Any, *given: Any) -> tuple[Tree, tuple]:
    """W as a backward that has no input gradient."""
    return stage.backward_weight(*given), ()


def _adding(backward: Callable, sums: Tree, params: Tree, *given: Any) -> tuple[Tree, Any]:
    """A backward whose weight gradients are added to their sums, as where conditionals commit."""
    gradients, others = wide_gradients(backward, params, *given)
    return accumulate(sums, gradients), others


def _of_blocks(rests: Sequence[Tree]) -> list[Tree]:
    """How the leaves of blocks lie over `tensor`, without the dim of the devices before theirs."""
    return jax.tree.map(lambda rest: Rest(tensor=None if rest.tensor is None else rest.tensor - 1), list(rests))


def _laid(shapes: Sequence[Any], shardings: Sequence[Sharding]) -> list[jax.ShapeDtypeStruct]:
    """Values as a compiled lane gives them."""
    pairs = zip(shapes, shardings, strict=True)
    return [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h) for s, h in pairs]


def _shares(laid: Sequence[Any]) -> dict:
    """Bytes on one device of values, by what they look like."""
    return {key_of(s): math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for s in laid}


def _slot_bytes(pool: Pool, known: dict) -> int:
    """Bytes of a slot on one device; what is not known lies there whole."""
    return sum(known.get(key_of(s), tree_bytes(s)) for s in pool.shapes)


def _sums_bytes(program: Program, share: Share) -> int:
    """Bytes of the gradient sums of the blocks."""
    places = program.stages.places
    rests = {places[c][p]: rest for c, row in enumerate(program.rests) for p, rest in enumerate(row)}
    accumulators = enumerate(program.stages.accumulators)
    return sum(a.num_rows * share.bytes(a.params, rests[n], accumulator_dtype) for n, a in accumulators)


def _copied_weights(program: Program, blocks: Tree, share: Share) -> int:
    """The most weights that are there beside those at rest, in another dtype or gathered over `fsdp`."""
    fsdp = program.layout.shard == "params" and program.mesh.shape[FSDP] > 1

    def copied(weights: Tree, own: Tree, rests: Tree) -> int:
        leaves = zip(*(jax.tree.leaves(tree) for tree in (weights, own, rests)), strict=True)
        return sum(
            share.bytes(cast, rest)
            for cast, kept, rest in leaves
            if cast.dtype != kept.dtype or (fsdp and rest.fsdp is not None)
        )

    each = [copied(*of) for of in zip(program.stages.weights, blocks, program.rests, strict=True)]
    if program.hops_block:  # XLA's CPU backend makes one gather of all
        return sum(each)
    here = [window.repeats for window in program.windows]
    return max(sum(each[c] for c in a | b) for a, b in zip(here, [*here[1:], frozenset()], strict=True))


def model_bytes(program: Program, params: Tree) -> ModelBytes:
    """Bytes per device of the pieces of a program.

    Working memory is what the compiler reports for the largest of one stage's backward and the head, each compiled
    alone for a device of the mesh (or for those of its axis `tensor`), which need not be there.

    Args:
        program: The program.
        params: Shapes of the pipeline parameters.
    """
    stages, ends, share = program.stages, program.ends, Share.of(program.mesh)
    split = "I" in program.table.schedule.phases
    made = list({id(branch.stage): branch for branch in stages.branches}.values())
    share.trace([branch.stage for branch in made], split)
    working, held = [], {}
    for branch in made:
        stage, own = branch.stage, program.rests[branch.repeat]
        rests = {
            "blocks": _of_blocks([own[p] for p in branch.positions]),
            "shared": shared_leaves(program.model, ends.rests["embed"]),
        }
        kept: list = stage.residuals
        if kept and share.size > 1:
            forward = share.compiled(stage.forward, (stage.params, stage.carry, stage.context), [rests])
            kept = _laid(kept, forward.output_shardings[2])
            held |= _shares(kept)
        given = stage.params, stage.carry, kept, stage.context

        def compiled(backward: Callable, shapes: tuple, rests: Tree = rests) -> Any:
            if program.skip != "branch":
                return share.compiled(backward, shapes, [rests])
            lane = partial(_adding, backward)
            return share.compiled(lane, (head_sums(shapes[0]), *shapes), [rests, rests], adds=True)

        arriving = stage.gradient, dict(stage.aux)
        if split:
            working.append(share.compiled(stage.backward_input, (*given, *arriving), [rests]))
            crossing = _laid(stage.weight_residuals, working[-1].output_shardings[1])
            held |= _shares(crossing)
            working.append(compiled(partial(_weights_alone, stage), (*given, crossing)))
        else:
            working.append(compiled(stage.backward, (*given, *arriving)))
    head, rests = jax.eval_shape(ends.head, ends.local), ends.head(ends.rests)
    given = head_sums(head), head, stages.stage.carry
    working.append(share.compiled(partial(_head, program), given, [rests, rests], adds=True))
    allotted = map(memory_of, working)
    return ModelBytes(
        carry=share.carry_bytes(stages.stage.carry, program.model.carry_spec),
        residual=_slot_bytes(stages.residuals, held),
        backward=max(
            lane.temp_size_in_bytes + lane.output_size_in_bytes - lane.alias_size_in_bytes for lane in allotted
        ),
        ends=sum(share.bytes(*pair) for pair in ends.moved),
        ends_gradient=share.bytes(ends.local, ends.rests, accumulator_dtype),
        stage_gradient=_sums_bytes(program, share),
        casts=_copied_weights(program, params["blocks"], share),
        weight_residual=_slot_bytes(stages.weight_residuals, held) if split else 0,
        gradient=share.carry_bytes(stages.stage.gradient, program.model.carry_spec),
    )
