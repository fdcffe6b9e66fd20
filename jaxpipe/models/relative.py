"""T5's relative positions: a bias on attention scores, one number per head and bucket of distances.

Shape legend: T queries and as many keys, H heads, L = 2T distances; while decoding R rows, C queries, S keys.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpipe.flax_nnx import nnx
from jaxpipe.models.fields import wide
from jaxpipe.models.layers import cut, normal


class RelativeBias(nnx.Module):
    """What distance adds to the scores of self-attention. `table` is [buckets, H]."""

    def __init__(
        self,
        num_heads: int,
        *,
        bidirectional: bool,
        num_buckets: int,
        max_distance: int,
        std: float,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.bidirectional, self.num_buckets, self.max_distance = bidirectional, num_buckets, max_distance
        self.table = cut(normal(rngs, (num_buckets, num_heads), std=std, dtype=param_dtype), dim=1)

    def __call__(self, num: int):
        """The bias of `num` queries on as many keys, [1, H, num, num], float32 or wider."""
        # Entry (t, s) depends on s - t only: 2*num distances are looked up, 0, 1, …, -2, -1, and row t is this circle
        # turned right by t. Laid end to end and cut one entry shorter, each row starts one later.
        circle = np.concatenate([np.arange(num), np.arange(-num, 0)])
        buckets_L = relative_buckets(
            circle, bidirectional=self.bidirectional, num_buckets=self.num_buckets, max_distance=self.max_distance
        )
        values_LH = self.table[...].astype(wide(self.table.dtype))[buckets_L]
        num_heads, length = values_LH.shape[1], 2 * num
        rows_HTL = jnp.broadcast_to(values_LH.T[:, None], (num_heads, num, length))
        turned_HTL = rows_HTL.reshape(num_heads, -1)[:, : num * (length - 1)].reshape(num_heads, num, length - 1)
        return turned_HTL[None, ..., :num]

    def between(self, queries_RC, keys_RS):
        """The bias of queries on keys at given positions, [R, H, C, S], float32 or wider. No key follows its query."""
        buckets = relative_buckets(
            -np.arange(self.max_distance + 1),
            bidirectional=self.bidirectional,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        values_LH = self.table[...].astype(wide(self.table.dtype))[buckets]
        distances_RCS = jnp.clip(queries_RC[:, :, None] - keys_RS[:, None], 0, self.max_distance)
        return jnp.moveaxis(values_LH[distances_RCS], -1, 1)


def relative_buckets(distances, *, bidirectional: bool, num_buckets: int, max_distance: int) -> np.ndarray:
    """Buckets of distances: one per distance while they are short, then logarithmically wider ones.

    Args:
        distances: Integers, position of the key minus position of the query.
        bidirectional: Whether half of the buckets are for keys after the query; else those share bucket 0.
        num_buckets: How many there are.
        max_distance: From here on all distances share the last bucket.

    Returns:
        Integers in [0, num_buckets), of the same shape.

    Source: Raffel et al., 2020, section 2.1; the cuts are those of the authors' code.

    Example:
        >>> relative_buckets([-300, -9, -2, 0, 2, 9], bidirectional=True, num_buckets=32, max_distance=128).tolist()
        [15, 8, 2, 0, 18, 24]
    """
    distances = np.asarray(distances)
    after = 0
    if bidirectional:
        num_buckets //= 2
        after = np.where(distances > 0, num_buckets, 0)
        distances = np.abs(distances)
    else:
        distances = np.maximum(-distances, 0)
    exact = num_buckets // 2
    ratio = np.log(np.maximum(distances, exact) / exact, dtype=np.float32) / np.float32(np.log(max_distance / exact))
    wider = exact + (ratio * (num_buckets - exact)).astype(np.int32)
    return after + np.where(distances < exact, distances, np.minimum(wider, num_buckets - 1))
