"""The keys and values that a device keeps, and how its lanes read and write them.

A stage's n-th block keeps its own in the n-th *room*, for every repeat and every slot ``[V, slots, S, ...]``: a room
for each block of the device's largest stage. Rooms pass through the loop and are written in place, outside of every
conditional; lanes only read them (DESIGN: what a conditional returns is copied).

The last position of a slot is never a token's, for the last token of a sequence is never fed to the model: rows that
have nothing to write write there.

Shape legend: R rows of a group, C tokens of a chunk, S positions of a slot.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.runtime.tree import Tree

OWN = ("k", "v")
"""What tokens add to, one entry per position; all else is written once per slot."""


def group_of(room: Tree, repeat: int, group, rows: int) -> Tree:
    """What the slots of a group keep in a room, leaves [R, S, ...]."""

    def cut(leaf):
        return lax.dynamic_slice_in_dim(leaf[repeat], group * rows, rows)

    return jax.tree.map(cut, room)


def slot_of(room: Tree, repeat: int, slot) -> Tree:
    """What one slot keeps in a room, leaves [1, S, ...]."""
    return group_of(room, repeat, slot, 1)


def write_tokens(room: Tree, repeat, group, positions_R, new: Tree) -> Tree:
    """Keeps one new token of each row of a group; leaves of `new` are [R, 1, ...], position -1 has none."""
    rows = len(positions_R)
    slots_R = group * rows + jnp.arange(rows, dtype=jnp.int32)

    def put(leaf, tokens):
        at_R = jnp.where(positions_R < 0, leaf.shape[2] - 1, positions_R)
        return leaf.at[repeat, slots_R, at_R].set(tokens[:, 0], unique_indices=True, mode="promise_in_bounds")

    return room | {name: put(room[name], new[name]) for name in OWN}


def write_chunk(room: Tree, repeat, slot, offset, new: Tree) -> Tree:
    """Keeps a chunk of one slot at positions `offset` and on, leaves of `new` [1, C, ...]; nothing for slot -1.

    What the encoder's output makes, `cross_k` and `cross_v`, is written from position 0.
    """

    def put(leaf, chunk, first):
        at = (repeat, jnp.maximum(slot, 0), first, *[0] * (leaf.ndim - 3))
        old = lax.dynamic_slice(leaf, at, (1, *chunk.shape))
        return lax.dynamic_update_slice(leaf, jnp.where(slot < 0, old, chunk[None]), at)

    return room | {name: put(room[name], chunk, offset if name in OWN else 0) for name, chunk in new.items()}


def num_bytes(shapes: Any) -> int:
    """Bytes of a tree of shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
