"""Optimizer state goes to the canonical layout and back whatever the optimizer keeps; checksums see every bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import toy_batch, toy_pipeline
from jax.sharding import NamedSharding, PartitionSpec

import jaxpipe as jp
from jaxpipe.errors import ConfigError
from jaxpipe.runtime.layout.checksum import PIECE, _piece_checksum, as_text, checksum, host_checksum
from jaxpipe.runtime.layout.state import StateLayout, host_copies

OPTIMIZERS = {
    "adafactor, accumulated": optax.MultiSteps(
        optax.adafactor(1e-2, min_dim_size_to_factor=8), 2
    ).gradient_transformation(),
    "muon, clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.contrib.muon(1e-2)),
}


def state_of(devices: int, repeats: int, tx: optax.GradientTransformation):
    """Random state of the tied toy model with 4 blocks, and its layouts."""
    name = "interleaved_1f1b" if repeats > 1 else "1f1b"
    pipe = toy_pipeline(name, devices, 2, repeats, blocks=4 // (devices * repeats), tied=True)
    params = pipe.init(jax.random.key(0), toy_batch(4))
    state = {"params": params, "opt_state": pipe.optimizer(tx).init(params)}
    return state, StateLayout(pipe.layout, state, params)


def gathered(state, layout):
    leaves, sums = {}, {}
    for chunk in layout.chunks:
        wholes, found = chunk.gather(layout.flatten(state))
        leaves |= {leaf.name: whole for leaf, whole in zip(chunk.leaves, wholes, strict=True)}
        sums |= {leaf.name: as_text(own) for leaf, own in zip(chunk.leaves, found, strict=True)}
    return leaves, sums


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_state_travels_to_another_mesh_and_keeps_every_bit(tx):
    state, layout = state_of(2, 2, tx)
    rng = np.random.default_rng(0)
    drawn = [
        jax.device_put((rng.normal(size=leaf.shape) * 100).astype(leaf.dtype), leaf.sharding)
        for leaf in jax.tree.leaves(state)
    ]
    state = layout.unflatten(drawn)
    leaves, sums = gathered(state, layout)
    assert {leaf.shape[0] for name, leaf in leaves.items() if "/blocks/" in name} == {4}
    assert sum("/blocks/" in name and name.startswith("opt_state") for name in leaves) >= 2

    other, there = state_of(1, 1, tx)
    flat: list = list(there.flatten(other))
    for chunk in there.chunks:
        wholes = [jax.device_put(np.asarray(leaves[leaf.name]), leaf.sharding) for leaf in chunk.leaves]
        found = chunk.scatter(wholes, flat)
        assert [as_text(own) for own in found] == [sums[leaf.name] for leaf in chunk.leaves]
    assert gathered(there.unflatten(flat), there)[1] == sums


@pytest.mark.parametrize("axes", [{}, {"fsdp": 2}, {"data": 2}], ids=str)
def test_the_host_makes_what_the_devices_make(axes):
    pipe = toy_pipeline("interleaved_1f1b", 2, 2, 2, blocks=1, tied=True, **axes)
    params = pipe.init(jax.random.key(0), toy_batch(4))
    state = {"params": params, "opt_state": pipe.optimizer(optax.adam(1e-2)).init(params)}
    layout = StateLayout(pipe.layout, state, params)
    leaves, sums = gathered(state, layout)
    copies = host_copies(layout.flatten(state))
    jax.tree.map(lambda leaf: leaf.delete(), state)
    wholes, found = layout.from_host(copies)
    for leaf, whole, own in zip(layout.leaves, wholes, found, strict=True):
        np.testing.assert_array_equal(whole, leaves[leaf.name])
        assert whole.sharding == leaf.sharding and as_text(own) == sums[leaf.name]
    assert copies == [None] * len(copies)


def test_gathered_arrays_outlive_the_state():
    state, layout = state_of(1, 1, optax.sgd(0.1))
    leaves, _ = gathered(state, layout)
    kept = jax.tree.map(np.array, leaves)
    jax.block_until_ready(jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)(state["params"]))
    jax.tree.map(np.testing.assert_array_equal, leaves, kept)


def test_state_of_some_blocks_only_is_refused():
    state, _ = state_of(2, 2, optax.sgd(0.1))
    pipe = toy_pipeline("interleaved_1f1b", 2, 2, 2, blocks=1, tied=True)
    partly = {"params": state["params"], "kept": {"blocks": [state["params"]["blocks"][0], []]}}
    with pytest.raises(ConfigError, match="covers 2 of 4 blocks of kind 'block' but must cover all or none"):
        StateLayout(pipe.layout, partly, state["params"])


@pytest.mark.parametrize("dtype", ["bfloat16", "int32", "bool"])
def test_a_checksum_sees_a_bit_a_place_and_no_sharding(dtype):
    mesh = jp.make_mesh(pipe=4)
    x = jnp.arange(64).reshape(8, 8).astype(dtype)
    sums = {as_text(jax.jit(checksum)(jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))))) for spec in SPECS}
    assert len(sums) == 1
    changed = [x.at[3, 4].set(x[3, 4] + 1 if dtype != "bool" else ~x[3, 4]), x.T]
    if dtype == "bool":
        changed = changed[:1]  # nearly all are true
    for other in changed:
        assert as_text(checksum(other)) not in sums


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (PIECE + 7,), (2, PIECE // 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "int8", "bool"])
def test_the_host_sums_as_the_devices_do(dtype, shape):
    x = (100 * np.random.default_rng(0).normal(size=shape)).astype(jnp.dtype(dtype))
    with jax.enable_x64(True):
        assert as_text(host_checksum(x)) == as_text(checksum(jnp.asarray(x)))


def test_places_are_counted_modulo_two_to_the_32():
    """As on the devices; an array of 2^31 words and more is not refused."""
    words = np.arange(1, 4, dtype=np.uint32)
    sums = [as_text(_piece_checksum(words, start)) for start in (5, 2**31 + 5, 2**32 + 5)]
    assert sums[0] == sums[2] != sums[1]


SPECS = ((), ("pipe",), (None, "pipe"))
