"""T5's relative positions: a bias on attention scores, one number per head and bucket of distances.

Shape legend: H heads, L distances; while decoding R rows, C queries, S keys.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpipe.flax_nnx import nnx
from jaxpipe.models.layers import cut, normal
from jaxpipe.ops.dtypes import wide


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

    def __call__(self):
        """The bias by distance from query to key, -max_distance to max_distance: [L, H], float32 or wider."""
        buckets_L = relative_buckets(
            np.arange(-self.max_distance, self.max_distance + 1),
            bidirectional=self.bidirectional,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        return self.table[...].astype(wide(self.table.dtype))[buckets_L]

    def between(self, queries_RC, keys_RS):
        """The bias of queries on keys at given positions, [R, H, C, S], float32 or wider. No key follows its query."""
        distances_RCS = jnp.clip(keys_RS[:, None] - queries_RC[:, :, None], -self.max_distance, 0)
        return jnp.moveaxis(self()[distances_RCS + self.max_distance], -1, 1)


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
