"""What one device knows while it runs the loop, and the small things that every lane asks of it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxpipe.runtime.layout.mesh import TENSOR
from jaxpipe.runtime.loop import slots
from jaxpipe.runtime.loop.clock import Clock
from jaxpipe.runtime.loop.lane import Commit, Lane, Skip, run_lane
from jaxpipe.runtime.model import Model, Tree
from jaxpipe.runtime.stage import keys
from jaxpipe.runtime.stage.ends import Ends, accumulate, shared_leaves
from jaxpipe.runtime.stage.stage import Context
from jaxpipe.runtime.stage.stages import Branch, Choices, Stages, pad
from jaxpipe.runtime.stage.wide import wide_gradients
from jaxpipe.schedule import TickTable


class Gradients(NamedTuple):
    """Weight gradients of a stage, to be added to the sums.

    Attributes:
        branch: Which branch made them, or None if that is not known when traced.
        own: Of the branch's parameters; or, in the form of `Stages.gradients`, of any.
    """

    branch: Branch | None
    own: Tree


@dataclass(frozen=True)
class Device:
    """One device in the loop.

    Attributes:
        model: The model.
        table: The tick table.
        stages: The lane functions of all stages.
        parts: Embedding and head.
        place: Its place on the axis `pipe`, int32.
        shard: Its data shard, int32.
        batch: Leaves ``[M, rows, ...]``.
        key: A key or None.
        blocks: Weights, ``blocks[repeat][position]``.
        ends: Gathered embedding and head parameters.
        skip: How lanes are idle, see `jaxpipe.runtime.loop.lane`.
        hops_block: Whether a hop ends before anything else starts, see `jaxpipe.runtime.loop.tick`.
        seeds: Gradients of the head's loss and of the blocks' `aux`, scalars.
        metrics: Shapes of the head's metrics of one row group if they are wanted, else an empty dict.
        loss_dtype: In which losses and weights are added up.
        simulated: Whether it is one of several devices that share a CPU.
        offload: Whether the stash (activations, residuals, weight-residuals) rests in the host's memory.
        second_stream: Whether the second of a lane's two hops has a stream of its own, see `Pipeline`.
        clock: What notes when lanes run, if anything does.
        ticks: The first tick at hand and the one after the last, None for all of the table; `blocks` may lack weights
            that these do not use.
        ends_inside: Whether the first stage's lanes hold the embedding and the last one's the head. Else these have
            lanes of their own: one more conditional, or loop, for every device in every tick.
    """

    model: Model
    table: TickTable
    stages: Stages
    parts: Ends
    place: Any
    shard: Any
    batch: Tree
    key: Any
    blocks: list
    ends: Tree
    skip: Skip
    seeds: tuple[Any, Any]
    metrics: Tree
    loss_dtype: Any
    hops_block: bool = False
    simulated: bool = False
    offload: bool = False
    second_stream: bool = False
    clock: Clock | None = None
    ticks: tuple[int, int] | None = None
    ends_inside: bool = False

    @property
    def embeds_inside(self) -> bool:
        """Whether the embedding is part of the first stage's lanes."""
        return self.ends_inside and "embed" not in self.parts.cut

    @property
    def head_inside(self) -> bool:
        """Whether the head is part of the last stage's forward lane."""
        return self.ends_inside and not self.parts.cut

    def choices(self, lane: str, first: bool = False, last: bool = False) -> Choices:
        """What devices choose from in a lane in the ticks at hand.

        Args:
            lane: ``f``, ``b`` or ``w``.
            first: See `Stages.choices`.
            last: See `Stages.choices`.
        """
        rows = self.table.columns[f"{lane}_repeat"][slice(*self.ticks or (None,))]
        used = {(repeat, place) for row in rows for place, repeat in enumerate(row) if repeat >= 0}
        return self.stages.choices(used, first, last)

    @cached_property
    def trains(self) -> bool:
        """Whether there is a backward lane."""
        return any(phase.backward for phase in self.table.phases)

    @cached_property
    def shared(self) -> Tree:
        """The leaves of the embedding that blocks use."""
        return shared_leaves(self.model, self.ends["embed"])

    @property
    def daux(self) -> dict:
        """The gradient of a stage's `aux`: only what joins the loss has one."""
        shapes = self.stages.stage.aux
        return {name: self.seeds[1].astype(s.dtype) if name == "loss" else zero(s) for name, s in shapes.items()}

    def slots(self, shapes: Tree, count: int, scratch: bool = True) -> Tree:
        """Buffers of `count` slots, and one that idle lanes write."""
        count += scratch
        return self.zeros(jax.tree.map(lambda s: jax.ShapeDtypeStruct((count, *s.shape), s.dtype), shapes))

    def stash(self, shapes: Tree, count: int, scratch: bool = True) -> Tree:
        """Slots of the stash, in the memory of the host if it is offloaded."""
        buffers = self.slots(shapes, count, scratch)
        return jax.device_put(buffers, jax.memory.Space.Host) if self.offload else buffers

    def keep(self, stash: Tree, at, values: Tree) -> Tree:
        """Writes a slot of the stash."""
        return slots.put(stash, at, values, self.offload)

    def fetch(self, stash: Tree, at) -> Tree:
        """Reads a slot of the stash."""
        return slots.get(stash, at, self.offload)

    def run(self, lane: Lane, state: dict, index, carry: Tree, given: Tree) -> tuple[dict, Tree, Commit]:
        """Runs a lane where `index` is not -1; see `run_lane`."""
        with jax.named_scope(lane.name):
            return self._run(lane, state, index, carry, given)

    def _run(self, lane: Lane, state: dict, index, carry: Tree, given: Tree) -> tuple[dict, Tree, Commit]:
        skip: Skip = "loop" if lane.rare and self.skip in ("branch", "deferred") else self.skip
        if self.clock is None or lane.label is None:
            return run_lane(skip, lane, state, index, carry, given, self.zeros)
        where = self.place, self.shard
        if self.skip == "mask":
            lane = replace(lane, branches=lane.branches * 2)  # a choice, which must wait for its index
        state, index = self.clock.start(where, lane, state, index, carry)
        state, carry, commit = run_lane(skip, lane, state, index, carry, given, self.zeros)
        state, carry = self.clock.stop(where, lane, state, index, carry, commit)
        return state, carry, commit

    def commits(self, rare: bool = False) -> bool:
        """Whether each branch of a lane commits what it makes; else all hand the same form to one commit for all.

        Args:
            rare: Of the lane.
        """
        return self.skip in ("branch", "loop") or (rare and self.skip == "deferred")

    @property
    def branches_commit(self) -> bool:
        """Whether each branch of the stages' lanes commits what it makes."""
        return self.commits()

    def wide(self, backward: Callable, params: Tree, *args: Any) -> tuple[Tree, Any]:
        """What a backward returns, its weight gradients as wide as their sums where each branch commits its own.

        Where one commit follows for all, what is handed to it is better narrow.

        Args:
            backward: ``(params, *args) -> (gradients of params, others)``.
            params: Parameters.
            args: The rest.
        """
        if not self.branches_commit:
            return backward(params, *args)
        return wide_gradients(backward, params, *args, convert=self.simulated)

    def gradients(self, branch: Branch, dw: Tree) -> "Gradients":
        """What a branch's backward leaves for `add`."""
        if self.branches_commit:
            return Gradients(branch, dw)
        return Gradients(None, self.stages.spread(branch, dw, self.zeros))

    def add(self, state: dict, repeat, gradients: "Gradients") -> dict:
        """The state's entries with the weight gradients of a stage added; those of an idle lane are zero.

        Args:
            state: The loop's state.
            repeat: Of the stage; -1 where the lane is idle.
            gradients: From `gradients`.
        """
        branch, own = gradients
        blocks = self._in_rows(state["blocks"], repeat, own) if branch is None else _apart(state["blocks"], branch, own)
        if not jax.tree.leaves(own["shared"]):
            return {"blocks": blocks}
        return {"blocks": blocks, "ends": self.parts.add_shared(state["ends"], own["shared"])}

    def _in_rows(self, blocks: list, repeat, own: Tree) -> list:
        accumulators, rows = self.stages.accumulators, self.stages.rows(jnp.maximum(repeat, 0))
        return [
            accumulate(sums, tree) if a.num_rows == 1 else slots.add(sums, row, tree)
            for a, sums, row, tree in zip(accumulators, blocks, rows, own["blocks"], strict=True)
        ]

    @property
    def updates(self) -> list[str]:
        """The entries of the state that `add` changes."""
        return ["blocks", "ends"] if jax.tree.leaves(self.shared) else ["blocks"]

    def zeros(self, shapes: Tree) -> Tree:
        """Zeros, each leaf filled from a scalar of its own that XLA cannot see to be zero.

        Equal constants would be made once and then copied into every output.
        """
        leaves, tree = jax.tree.flatten(shapes)
        scalars = [jnp.minimum(self.place + k, 0) for k in range(len(leaves))]
        filled = [jnp.full(s.shape, x.astype(s.dtype)) for s, x in zip(leaves, scalars, strict=True)]
        return jax.tree.unflatten(tree, filled)

    def lay(self, values: Tree) -> Tree:
        """A carry, or its gradient, as it lies over `tensor` between blocks; leaves that do not divide stay whole."""
        return self._constrain(values, self.model.carry_spec)

    def whole(self, values: Tree) -> Tree:
        """The same, whole on each device of `tensor`: what embedding and head see.

        They look up and slice in ways that XLA would do by a permute if a sequence were cut. Permutes are a meeting of
        all devices, and in a lane that not all of them run there would be no end to it.
        """
        return self._constrain(values, PartitionSpec())

    def _constrain(self, values: Tree, spec: PartitionSpec) -> Tree:
        mesh = jax.sharding.get_abstract_mesh()
        tensor = mesh.shape.get(TENSOR, 1)
        if tensor == 1:
            return values

        def place(x):
            fits = x.ndim >= len(spec) and not any(x.shape[n] % tensor for n, axis in enumerate(spec) if axis)
            return lax.with_sharding_constraint(x, NamedSharding(mesh, spec if fits else PartitionSpec()))

        return jax.tree.map(place, values)

    def context(self, microbatch, repeat) -> Context:
        """What a lane needs to know of the microbatch and stage it works on; anything valid where it is idle."""
        microbatch, repeat = jnp.maximum(microbatch, 0), jnp.maximum(repeat, 0)
        mb = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, microbatch, keepdims=False), self.batch)
        group = keys.group_key(self.key, self.shard * self.table.schedule.microbatches + microbatch)
        return Context(mb, group, self.stages.first_block(repeat, self.place))


def zero(shape):
    """Zeros of a shape."""
    return jnp.zeros(shape.shape, shape.dtype)


def _apart(blocks: list, branch: Branch, own: Tree) -> list:
    """The sums ``blocks[repeat][position]`` with the gradients of a branch added."""
    row = list(blocks[branch.repeat])
    for position, tree in zip(branch.positions, own["blocks"], strict=True):
        row[position] = accumulate(row[position], pad(tree, row[position]))
    return [row if repeat == branch.repeat else sums for repeat, sums in enumerate(blocks)]
