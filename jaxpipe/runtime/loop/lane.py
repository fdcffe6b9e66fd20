"""Running a lane, or not: four ways to be idle.

A lane computes values and *commits* them: into slots and accumulators, which are large and must be updated in place.

    branch    a conditional computes and commits, each branch what it makes; where the lane is idle, all passes through
              untouched. One round trip to the host per lane on a GPU.
    deferred  a conditional computes, idle lanes give zeros, and the commit follows outside of it. One round trip too,
              but what the branches make is written and read once more, and an idle lane writes its zeros into a scratch
              slot and adds them to the accumulators.
    loop      loops of one turn or none, one for each branch, compute and commit: what a loop carries is updated in
              place. Two round trips to the host per working lane on a GPU, and one for every other branch; none on a
              CPU.
    mask      idle lanes compute too and what they make counts as zero. No round trip where there is one branch only,
              but work for nothing, and power.

GPUs take branches. XLA before jaxlib 0.11.1 passes a buffer through the first branch of a conditional in place and
copies it in every other [1], so there a lane of several branches is deferred. The lanes of embedding and head are rare:
to add gradients of zero, as large as the vocabulary, in every tick would cost more than a loop, so where lanes are
deferred these are loops. Simulated CPU devices, which share cores, take loops; masks are for whoever measured them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from jaxpipe.jax_internals import jaxlib_version
from jaxpipe.runtime.layout.mesh import on_cpu
from jaxpipe.runtime.model import Tree
from jaxpipe.runtime.stage.stages import Stages

Skip = Literal["branch", "deferred", "loop", "mask"]

PASSES_IN_PLACE = jaxlib_version() >= (0, 11, 1)
"""Whether XLA passes buffers through every branch of a conditional in place [1]."""


def skip_of(mesh: Mesh, stages: Stages, offload: bool = False) -> Skip:
    """How lanes of stages are idle on a mesh; an offloaded stash stays outside of conditionals."""
    if on_cpu(mesh):
        return "loop"
    in_place = PASSES_IN_PLACE or len(stages.branches) == 1
    return "branch" if in_place and not offload else "deferred"


@dataclass(frozen=True)
class Lane:
    """What a lane computes, and what becomes of it.

    Attributes:
        name: In profiles and in XLA's text; no two lanes of a tick have the same.
        branches: ``given -> (carry, kept)``: what is passed on, and what is committed. What is committed is alike in
            all of them where one commit follows (``deferred`` and ``mask``).
        commit: ``(state, kept) -> state``, for the entries of the loop's state that the lane updates.
        kept: Shapes of what is committed, for ``deferred``.
        updates: Names of these entries.
        label: For a `jaxpipe.runtime.loop.clock.Clock`: the lane's letter and the row of the table.
        rare: One device in P runs it and what it commits is large.
        adds: Its branches are ``(given, entries) -> (carry, kept)``: where each commits what it makes, they have the
            entries of the state that the lane updates and may commit their new values; elsewhere they have None and
            commit what is to be added.
    """

    name: str
    branches: list[Callable[..., tuple[Tree, Any]]]
    commit: Callable[[dict, Any], dict]
    kept: Any
    updates: list[str]
    label: tuple[str, dict] | None = None
    rare: bool = False
    adds: bool = False


@jax.tree_util.register_pytree_node_class
class Commit:
    """A commit that waits for its lane's fence; calling it with the state does it."""

    def __init__(self, commit: Callable[[dict, Any], dict] | None, kept: Any):
        self.commit, self.kept = commit, kept

    def __call__(self, state: dict) -> dict:
        """The state with the commit done."""
        return state if self.commit is None else state | self.commit(state, self.kept)

    def tree_flatten(self):
        """What passes the fence: the values to be committed."""
        return (self.kept,), self.commit

    @classmethod
    def tree_unflatten(cls, commit, children):
        """The commit of values that passed the fence."""
        return cls(commit, *children)


def run_lane(
    skip: Skip, lane: Lane, state: dict, index: Any, carry: Tree, given: Any, zeros: Callable[[Any], Any]
) -> tuple[dict, Tree, Commit]:
    """Runs ``lane.branches[index]`` and commits what it makes; does nothing for -1.

    Args:
        skip: How it does nothing.
        lane: What it computes and commits.
        state: The loop's state.
        index: Which branch, or -1.
        carry: What it passes on if it does not run; with ``mask`` anything of the same shapes.
        given: All that its branches read.
        zeros: ``shapes -> arrays``.

    Returns:
        The state, what the lane passes on, and the commit that is still to be done.
    """
    if skip == "loop":
        part = {name: state[name] for name in lane.updates}
        part, carry = _run_loops(lane, part, index, carry, given)
        return state | part, carry, Commit(None, None)
    if skip == "branch":
        part = {name: state[name] for name in lane.updates}
        working = [partial(_committed, lane, branch) for branch in lane.branches]
        part, carry = lax.switch(index + 1, [lambda part, carry, given: (part, carry), *working], part, carry, given)
        return state | part, carry, Commit(None, None)
    given = (given, None) if lane.adds else (given,)
    branches = [lambda branch=branch: branch(*given) for branch in lane.branches]
    if skip == "deferred":
        carry, kept = lax.switch(index + 1, [lambda: (carry, zeros(lane.kept)), *branches])
        return state, carry, Commit(lane.commit, kept)
    carry, kept = lax.switch(jnp.maximum(index, 0), branches) if len(branches) > 1 else branches[0]()
    kept = jax.tree.map(lambda x: jnp.where(index >= 0, x, jnp.zeros_like(x)), kept)
    return state, carry, Commit(lane.commit, kept)


def _committed(lane: Lane, branch: Callable, state: dict, carry: Tree, given: Any) -> tuple[dict, Tree]:
    carry, kept = branch(given, state) if lane.adds else branch(given)
    return state | lane.commit(state, kept), carry


def _run_loops(lane: Lane, state: dict, index: Any, carry: Tree, given: Any) -> tuple[dict, Tree]:
    def turn(branch, loop):
        at, state, _, given = loop
        # Nothing but this barrier tells XLA that the turn depends on being in the loop: without it, it computes the
        # turn in advance, whether or not there will be one.
        at, given = lax.optimization_barrier((at, given))
        carry, kept = branch(given, state) if lane.adds else branch(given)
        return at + 1, state | lane.commit(state, kept), carry, given

    for number, branch in enumerate(lane.branches):
        turns = (index == number).astype(jnp.int32)
        loop = jnp.int32(0), state, carry, given
        with jax.named_scope(f"branch_{number}"):  # [2]
            _, state, carry, given = lax.while_loop(lambda loop, n=turns: loop[0] < n, partial(turn, branch), loop)
    return state, carry


# [1] Read off programs compiled for H100s with jaxlib 0.10.2 and 0.12.0.1, tests/runtime/test_gpu_schedule.py.
# [2] So `jaxpipe.runtime.measure.traffic` knows that one of these loops turns, and not all.
