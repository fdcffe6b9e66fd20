"""Relative positions against the definition, distance by distance."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxpipe.models.relative import RelativeBias, relative_buckets
from jaxpipe.ops.blockwise import by_distance


def bucket(distance: int, bidirectional: bool, num_buckets: int, max_distance: int) -> int:
    """Raffel et al., 2020, section 2.1, one distance at a time and with whole numbers where it counts."""
    first = 0
    if bidirectional:
        num_buckets //= 2
        first = num_buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = -distance if distance < 0 else 0
    exact = num_buckets // 2
    if distance < exact:
        return first + distance
    # The largest step with exact * (max_distance/exact)**(step/steps) <= distance, both sides to the power of steps.
    steps, step = num_buckets - exact, 0
    while step + 1 < steps and exact ** (steps - step - 1) * max_distance ** (step + 1) <= distance**steps:
        step += 1
    return first + exact + step


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (4, 3), (64, 256)])
def test_buckets_equal_their_definition(bidirectional, num_buckets, max_distance):
    distances = np.arange(-300, 301)
    how = {"bidirectional": bidirectional, "num_buckets": num_buckets, "max_distance": max_distance}
    expected = [bucket(int(d), bidirectional, num_buckets, max_distance) for d in distances]
    np.testing.assert_array_equal(relative_buckets(distances, **how), expected)
    seen = set(expected)
    assert seen == set(range(num_buckets)) - ({num_buckets // 2} if bidirectional else set())


def make_bias(num_heads: int, bidirectional: bool) -> RelativeBias:
    return RelativeBias(
        num_heads,
        bidirectional=bidirectional,
        num_buckets=8,
        max_distance=9,
        std=1.0,
        param_dtype="float32",
        rngs=nnx.Rngs(0),
    )


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num", [1, 2, 11])
def test_the_bias_of_a_pair_is_the_table_entry_of_its_distance(bidirectional, num):
    module = make_bias(3, bidirectional)
    table = np.asarray(module.table[...])
    expected = [
        [[table[bucket(s - t, bidirectional, 8, 9), head] for s in range(num)] for t in range(num)] for head in range(3)
    ]
    np.testing.assert_array_equal(by_distance(module(), num, num), np.array(expected)[None])


def test_the_gradient_of_the_table_counts_the_pairs_of_a_bucket():
    graphdef, state = nnx.split(make_bias(1, bidirectional=True))
    grad = jax.tree.leaves(jax.grad(lambda state: by_distance(nnx.merge(graphdef, state)(), 7, 7).sum())(state))[0]
    pairs = [bucket(s - t, True, 8, 9) for t in range(7) for s in range(7)]
    np.testing.assert_allclose(grad[:, 0], np.bincount(pairs, minlength=8))
