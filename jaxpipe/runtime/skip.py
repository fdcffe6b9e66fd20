"""Running a lane, or not: two ways to skip, for two kinds of machine.

A lane computes values and *commits* them: into slots and accumulators, which are large and must be updated in place.

    branch   a conditional computes, idle lanes give zeros, and the commit follows outside of it: updated inside, XLA
             copies slots and accumulators whole. One round trip to the host per lane on a GPU. An idle lane writes its
             zeros into a scratch slot: nobody waits for it, unless devices share cores.
    loop     a loop of one turn or none computes and commits: what a loop carries is updated in place, and an idle lane
             does nothing at all. Two round trips to the host per working lane on a GPU, none on a CPU.

So GPUs take branches and simulated CPU devices, which share cores, take loops.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax

Skip = Literal["branch", "loop"]


def run_branch(index: Any, branches: list[Callable[[], Any]], idle: Callable[[], Any]) -> Any:
    """The outputs of ``branches[index]``, or of `idle` for -1."""
    return lax.switch(index + 1, [idle, *branches])


def run_loop(
    index: Any,
    branches: list[Callable[[Any], Any]],
    commit: Callable[[dict, Any], dict],
    state: dict,
    carry: Any,
    given: Any,
) -> tuple[dict, Any]:
    """Runs ``branches[index]`` and commits what it makes; does nothing for -1.

    Args:
        index: Which branch, or -1.
        branches: ``given -> (carry, kept)``.
        commit: ``(state, kept) -> state``.
        state: What the commit updates.
        carry: What stands for the branch's first output if nothing runs.
        given: All that the branches read.

    Returns:
        The new state and the carry.
    """

    def turn(loop):
        at, state, _, given = loop
        # Nothing but this barrier tells XLA that the turn depends on being in the loop: without it, it computes the
        # turn in advance, whether or not there will be one.
        at, given = lax.optimization_barrier((at, given))
        carry, kept = lax.switch(index, [lambda branch=branch: branch(given) for branch in branches])
        return at + 1, commit(state, kept), carry, given

    turns = (index >= 0).astype(jnp.int32)
    _, state, carry, _ = lax.while_loop(lambda loop: loop[0] < turns, turn, (jnp.int32(0), state, carry, given))
    return state, carry
