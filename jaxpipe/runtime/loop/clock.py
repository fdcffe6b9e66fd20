"""A clock for debugging: the host notes when lanes start and end on every device.

Nothing of it is in a program that was not asked for it. A callback to the host takes tens of microseconds, so lanes
should be much longer.

XLA orders by data only. Before a lane the callback reads an element of everything that the lane waits for, and the lane
runs if the callback's answer, always 0, says so; after it the callback reads an element of everything that it made, and
what is passed on has the answer added. The answers form a chain through the loop's state, so the lanes of a device are
noted one after the other.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import io_callback

from jaxpipe.runtime.loop.lane import Lane
from jaxpipe.runtime.model import Tree

LANES = ("F", "B", "I", "W", "head", "embed")
"""What is noted: the phases, the head with its gradient, and the embedding's gradient."""

_LABELS = {"f": ("F", "f"), "h": ("head", "f"), "b": ("B", "b"), "e": ("embed", "b"), "w": ("W", "w")}
"""By a lane's letter, what is noted and whose columns say for which stage and microbatch."""


class Note(NamedTuple):
    """A moment.

    Attributes:
        time_ns: `time.perf_counter_ns`.
        place: The device's place on the axis `pipe`.
        shard: Its data shard.
        lane: One of `LANES`.
        repeat: Which of the device's stages.
        microbatch: Which microbatch.
        ends: Whether the lane ends; else it starts.
    """

    time_ns: int
    place: int
    shard: int
    lane: str
    repeat: int
    microbatch: int
    ends: bool


class Clock:
    """Notes of all runs since `notes` was last cleared.

    A program takes it as its field `clock`; the mesh must have no axis that is left to the compiler, for a callback
    must know its device.

    Attributes:
        notes: In the order in which they were made; complete after `jax.effects_barrier`.
    """

    def __init__(self):
        self.notes: list[Note] = []

    def start(self, where: tuple, lane: Lane, state: dict, index: Any, carry: Tree) -> tuple[dict, Any]:
        """Notes the start of a lane unless `index` is -1.

        Args:
            where: The device's place and shard.
            lane: A lane with a label.
            state: The loop's state.
            index: Which branch the lane takes.
            carry: What it waits for.

        Returns:
            The state, and the index that the lane must use.
        """
        token = self._note(where, lane, state["clock"], index, carry, ends=False)
        return state | {"clock": token}, index + token

    def stop(self, where: tuple, lane: Lane, state: dict, index: Any, carry: Tree, kept: Tree) -> tuple[dict, Tree]:
        """Notes the end of a lane unless `index` is -1.

        Args:
            where: The device's place and shard.
            lane: The lane.
            state: The loop's state after the lane.
            index: As `start` returned it.
            carry: What the lane passes on.
            kept: What is still to be committed.

        Returns:
            The state, and what is passed on, which now waits for the note.
        """
        made = carry, kept, [state[name] for name in lane.updates]
        token = self._note(where, lane, state["clock"], index, made, ends=True)
        return state | {"clock": token}, jax.tree.map(lambda x: x + token.astype(x.dtype), carry)

    def _note(self, where: tuple, lane: Lane, token: Any, index: Any, waits_for: Tree, ends: bool) -> Any:
        assert lane.label is not None
        letter, row = lane.label
        name, column = _LABELS[letter]
        number = jnp.int32(LANES.index(name))
        if letter == "b":
            number += row["b_input_only"] == 1

        def write(*numbers):
            place, shard, number, repeat, microbatch = map(int, numbers[:5])
            note = Note(time.perf_counter_ns(), place, shard, LANES[number], repeat, microbatch, ends)
            self.notes.append(note)
            return np.int32(0)

        known = *where, number, row[f"{column}_repeat"], row[f"{column}_microbatch"], token, _element(waits_for)
        answer = jax.ShapeDtypeStruct((), jnp.int32)
        return lax.cond(index >= 0, lambda: io_callback(write, answer, *known), lambda: token)


def _element(tree: Tree) -> Any:
    """A number that cannot be known before every leaf is."""
    leaves = [x for x in jax.tree.leaves(tree) if x.size]
    firsts = [lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(()).astype(jnp.float32) for x in leaves]
    return sum(firsts, jnp.zeros((), jnp.float32))
