"""A vocabulary cut over the pipe: which rows of table and kernel a device holds, and how they get there and back.

Device d of P holds rows ``d * n .. (d + 1) * n - 1`` of ``n * P`` with ``n = ceil(V / P)``; rows past V are zero and
count for nothing. Where P divides V, leaves rest like this and nothing moves.
"""

import jax.numpy as jnp
from jax import lax

from jaxpipe.ops.losses import Entropy, in_vocabulary
from jaxpipe.runtime.layout.collect import add_up
from jaxpipe.runtime.layout.mesh import PIPE


def rows_per_device(size: int, devices: int) -> int:
    """n: how many rows a device holds."""
    return -(-size // devices)


def take_rows(leaf, dim: int | None, shape: tuple[int, ...], devices: int, place):
    """This device's rows of a leaf ``[V, D]`` from the shard in which it rests.

    Args:
        leaf: The shard.
        dim: The dim that it is sharded on.
        shape: Of the whole leaf.
        devices: P.
        place: This device's place on the pipe.
    """
    rows = rows_per_device(shape[0], devices)
    if dim == 0 or devices == 1:
        return leaf
    padded = jnp.pad(leaf, ((0, rows * devices - shape[0]), (0, 0)))
    if dim == 1:
        return lax.all_to_all(padded, PIPE, split_axis=0, concat_axis=1, tiled=True)
    return lax.dynamic_slice_in_dim(padded, place * rows, rows)


def give_rows(rows, dim: int | None, shape: tuple[int, ...], devices: int):
    """The way back: the shard in which a leaf rests from the rows of all devices."""
    if dim == 0 or devices == 1:
        return rows
    if dim == 1:
        return lax.all_to_all(rows, PIPE, split_axis=1, concat_axis=0, tiled=True)[: shape[0]]
    return lax.all_gather(rows, PIPE, tiled=True)[: shape[0]]


def look_up_rows(rows, ids, first, size: int, simulated: bool):
    """Rows of the whole table, looked up by all devices together; NaN where an id is out of range.

    Args:
        rows: This device's.
        ids: Integers of any shape.
        first: The id of this device's first row.
        size: V.
        simulated: Whether the devices are CPU devices.
    """
    local = ids - first
    here = (local >= 0) & (local < len(rows))
    found = jnp.take(rows, jnp.clip(local, 0, len(rows) - 1), axis=0)
    found = add_up(jnp.where(here[..., None], found, 0), PIPE, simulated)
    return jnp.where(in_vocabulary(ids, size)[..., None], found, jnp.nan)


def add_rows(rows, ids, first, gradient):
    """Adds the gradients of looked-up rows to this device's.

    Args:
        rows: Accumulators.
        ids: Integers of any shape.
        first: The id of this device's first row.
        gradient: Like `ids`, with the rows' last dim.
    """
    local = ids - first
    here = (local >= 0) & (local < len(rows))
    at = jnp.where(here, local, len(rows)).reshape(-1)
    return rows.at[at].add(gradient.reshape(-1, gradient.shape[-1]).astype(rows.dtype), mode="drop")


def sliced_entropy(rows: int, first, size: int) -> Entropy:
    """Cross entropies from this device's slice of the logits; maximum, sum and target logit are joined over the pipe.

    Args:
        rows: Words of this device's slice.
        first: The number of the first.
        size: V.
    """

    def entropy(logits, ids):
        numbers = (first + jnp.arange(rows)).reshape(*[1] * ids.ndim, -1)
        logits = jnp.where(numbers < size, logits, -jnp.inf)
        # Without this a device that holds no row at all would have no maximum.
        largest = lax.pmax(jnp.maximum(logits.max(-1), jnp.finfo(logits.dtype).min), PIPE)
        weights = jnp.exp(logits - largest[..., None])
        total = lax.psum(weights.sum(-1), PIPE)
        is_target = jnp.expand_dims(ids, -1) == numbers
        target = lax.psum(jnp.sum(logits, axis=-1, where=is_target), PIPE)

        def back(dlosses):
            return (weights / total[..., None] - is_target) * dlosses[..., None]

        return jnp.log(total) + largest - target, back

    return entropy
