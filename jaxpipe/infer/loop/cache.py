"""The keys and values that a device keeps, and how its lanes read and write them.

A stage's n-th block keeps its own in the n-th *room*: for each of the device's repeats and each group an array
``[R, K, S, d]``. One array for all of them would be sliced by the number of the group, which copies what it reads; the
branches of a lane know their repeat and group, and products read the arrays where they are. Rooms pass through the loop
and are written in place, outside of every conditional (what a conditional returns is copied).

The last position of a slot is never a token's, for the last token of a sequence is never fed to the model: rows that
have nothing to write write there.

Shape legend: R rows of a group, C tokens of a chunk, S positions of a slot, K heads of d dims.
"""

import jax.numpy as jnp
from jax import lax

from jaxpipe.runtime.layout.tree import Tree

OWN = ("k", "v")
"""What tokens add to, one entry per position; all else is written once per slot."""


def of_group(room: Tree, repeat: int, group: int) -> Tree:
    """What the slots of a group keep in a room, leaves [R, K, S, d]."""
    return {name: arrays[repeat][group] for name, arrays in room.items()}


def of_slot(room: Tree, repeat: int, slot) -> Tree:
    """What one slot keeps in a room, leaves [1, K, S, d]."""

    def cut(groups):
        rows = len(groups[0])
        return lax.select_n(slot // rows, *[lax.dynamic_slice_in_dim(leaf, slot % rows, 1) for leaf in groups])

    return {name: cut(arrays[repeat]) for name, arrays in room.items()}


def put_tokens(leaf, positions_R, new_RK1d):
    """Keeps one new token of each row; position -1 has none."""
    at_R = jnp.where(positions_R < 0, leaf.shape[2] - 1, positions_R)
    rows_R = jnp.arange(len(positions_R), dtype=jnp.int32)
    return leaf.at[rows_R, :, at_R].set(new_RK1d[:, :, 0], unique_indices=True, mode="promise_in_bounds")


def put_chunk(leaf, row, first, new_1KCd):
    """Keeps a chunk of one row at positions `first` and on; nothing for row -1."""
    at = (jnp.maximum(row, 0), 0, first, 0)
    old = lax.dynamic_slice(leaf, at, new_1KCd.shape)
    return lax.dynamic_update_slice(leaf, jnp.where(row < 0, old, new_1KCd), at)
