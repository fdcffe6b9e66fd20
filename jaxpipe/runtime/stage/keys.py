"""Random keys: a function of the row group and the place in the model, never of the device or the schedule.

A row group is the rows that one data shard processes in one microbatch, numbered contiguously over the global batch. So
results do not depend on P, V, the schedule, or how the batch is split, as long as row groups have the same size.
"""

import jax

EMBED = 0


def init_keys(key, num_blocks: int):
    """Keys to make parameters with: embedding, head, and one per block in a `[num_blocks]` array."""
    embed, head, blocks = jax.random.split(key, 3)
    return embed, head, jax.vmap(lambda i: jax.random.fold_in(blocks, i))(jax.numpy.arange(num_blocks))


def group_key(key, row_group):
    """The key of one row group; None stays None (deterministic)."""
    return None if key is None else jax.random.fold_in(key, row_group)


def embed_key(group):
    """The key of the embedding for a row group's key."""
    return None if group is None else jax.random.fold_in(group, EMBED)


def block_key(group, block):
    """The key of block number `block` (global, from 0) for a row group's key."""
    return None if group is None else jax.random.fold_in(group, 1 + block)


def head_key(group, num_blocks: int):
    """The key of the head for a row group's key."""
    return block_key(group, num_blocks)
