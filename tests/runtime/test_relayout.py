"""Canonical and pipeline layout are the same numbers in two places."""

import jax
import numpy as np
import pytest
from helpers import toy_batch, toy_model, toy_pipeline, tree_allclose

import jaxpipe as jp
from jaxpipe.errors import PartitionError
from jaxpipe.runtime.layout.rest import first_dim

SPLITS = [
    ("1f1b", 1, 1, 8),
    ("1f1b", 2, 1, 4),
    ("interleaved_1f1b", 2, 2, 2),
    ("interleaved_1f1b", 4, 2, 1),
    ("v_min", 2, 2, 2),
]


def bit_equal(a, b) -> bool:
    """Same structure, same bits."""
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b))


@pytest.mark.parametrize(("name", "devices", "repeats", "blocks"), SPLITS)
def test_round_trip_is_bit_equal_both_ways(name, devices, repeats, blocks):
    pipe = toy_pipeline(name, devices, 2, repeats, blocks=blocks, tied=True)
    params = pipe.init(jax.random.key(0), toy_batch(4))
    canonical = pipe.to_canonical(params)
    back = pipe.from_canonical(canonical)
    assert bit_equal(back, params)
    assert bit_equal(pipe.to_canonical(back), canonical)
    assert bit_equal(pipe.from_canonical(jax.tree.map(np.asarray, canonical)), params)


def test_weights_do_not_depend_on_devices_or_repeats():
    trees = []
    for name, devices, repeats, blocks in SPLITS:
        pipe = toy_pipeline(name, devices, 2, repeats, blocks=blocks)
        trees.append(pipe.to_canonical(pipe.init(jax.random.key(0), toy_batch(4))))
    oracle = jp.sequential(toy_model(8), row_groups=2).init(jax.random.key(0), toy_batch(4))
    for tree in trees:
        tree_allclose(tree, oracle)


def test_each_device_holds_its_own_blocks_and_a_share_of_the_ends():
    pipe = toy_pipeline("interleaved_1f1b", 4, 4, 2)
    params = pipe.init(jax.random.key(0), toy_batch(8))
    canonical = pipe.to_canonical(params)
    for c, stage in enumerate(params["blocks"]):
        for shard in stage[0]["up"].addressable_shards:
            device = pipe.mesh.devices.ravel().tolist().index(shard.device)
            np.testing.assert_array_equal(shard.data[0], canonical["blocks"]["block"]["up"][4 * c + device])
    table = params["embed"]["table"]
    assert {shard.data.shape for shard in table.addressable_shards} == {(table.shape[0] // 4, table.shape[1])}


@pytest.mark.parametrize(
    ("shape", "devices", "dim"),
    [((50257, 768), 4, 1), ((8, 6), 4, 0), ((3, 5), 4, None), ((), 4, None), ((8,), 1, None)],
)
def test_a_leaf_is_sharded_on_its_first_dim_that_divides(shape, devices, dim):
    assert first_dim(shape, devices) == dim


def test_a_canonical_tree_of_another_depth_or_kind_is_refused():
    pipe = toy_pipeline("1f1b", 2, 2, blocks=2)
    canonical = pipe.to_canonical(pipe.init(jax.random.key(0), toy_batch(4)))
    short = {**canonical, "blocks": {"block": jax.tree.map(lambda x: x[:3], canonical["blocks"]["block"])}}
    with pytest.raises(PartitionError, match="have 3 layers but the model has 4; try a model with 3 blocks"):
        pipe.from_canonical(short)
    other = {**canonical, "blocks": {"decoder": canonical["blocks"]["block"]}}
    with pytest.raises(PartitionError, match=r"blocks=\['decoder'\] must be of the model's kinds; try \['block'\]"):
        pipe.from_canonical(other)


def test_donated_parameters_leave_the_canonical_tree_valid():
    pipe = toy_pipeline("gpipe", 1, 2, 1, blocks=2)
    canonical = pipe.to_canonical(pipe.init(jax.random.key(0), toy_batch(4)))
    kept = jax.tree.map(np.asarray, canonical)
    params = pipe.from_canonical(canonical)
    jax.block_until_ready(jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)(params))
    jax.tree.map(np.testing.assert_array_equal, canonical, kept)
