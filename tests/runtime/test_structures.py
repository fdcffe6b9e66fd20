"""Models that are no row of equal blocks: uneven stages, several kinds, aux losses, integer carries, shared leaves."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import QUICK, ROWS, VOCAB, WIDTH, toy_batch, toy_model, toy_oracle, tree_allclose

import jaxpipe as jp
from jaxpipe.schedule import build


def drop(x, key):
    """Dropout of a fifth."""
    return x if key is None else jnp.where(jax.random.bernoulli(key, 0.8, x.shape), x / 0.8, 0)


def varied_model(kinds: str) -> jp.Model:
    """One block per letter: d dense, m a mixture with an aux loss, s a swap of two streams, all on a rich carry.

    The carry is a dict: two streams of different widths, segment ids (which `s` changes) and a mask of bools. All dense
    blocks share a bias that lives in the embedding.
    """

    def normal(key, *shape):
        return 0.4 * jax.random.normal(key, shape)

    def embed(p, mb, key):
        x = drop(p["table"][mb["tokens"]], key)
        segments = (jnp.arange(x.shape[1])[None] * 3 // x.shape[1] + mb["tokens"][:, :1]).astype(jnp.int32)
        return {"x": x, "y": x[..., :3], "segments": segments, "seen": mb["mask"] > 0}

    def dense(p, c, mb, key):
        same = (c["segments"][:, :, None] == c["segments"][:, None]) & c["seen"][:, None]
        mixed = jnp.where(same, 1.0, 0.0) @ jnp.tanh(c["x"] @ p["up"] + p["bias"][None, None])
        return c | {"x": c["x"] + drop(mixed @ p["down"], key)}

    def mixture(p, c, mb, key):
        gates = jax.nn.softmax(c["x"] @ p["router"])
        outs = jnp.einsum("btd,def->btef", c["x"], p["experts"])
        aux = 0.1 * (gates.mean((0, 1)) ** 2).sum()
        return c | {"x": c["x"] + drop((jnp.tanh(outs) * gates[..., None]).sum(2), key)}, aux

    def swap(p, c, mb, key):
        y = c["y"] + jnp.tanh(c["x"] @ p["down"])
        return c | {"x": c["x"] + y @ p["up"], "y": y, "segments": c["segments"][:, ::-1]}

    def head(p, c, mb, key):
        x = jnp.concatenate([c["x"], c["y"]], -1)
        logits = jax.nn.log_softmax(drop(x, key) @ p["kernel"])
        ce = -jnp.take_along_axis(logits, mb["targets"][..., None], -1)[..., 0] * (1 + c["segments"] % 2)
        hits = (logits.argmax(-1) == mb["targets"]).sum()
        return (ce * mb["mask"]).sum(), mb["mask"].sum(), {"ce": ce, "hits": hits}

    def init(shapes):
        def make(key, *_):
            return {name: normal(jax.random.fold_in(key, n), *shape) for n, (name, shape) in enumerate(shapes.items())}

        return make

    up_down = {"up": (WIDTH, 6), "down": (6, WIDTH), "bias": (6,)}
    blocks = {
        "d": jp.Block(init(up_down), dense, kind="dense"),
        "m": jp.Block(init({"router": (WIDTH, 3), "experts": (WIDTH, 3, WIDTH)}), mixture, kind="moe"),
        "s": jp.Block(init({"down": (WIDTH, 3), "up": (3, WIDTH)}), swap, kind="swap"),
    }
    return jp.Model(
        jp.Embed(init({"table": (VOCAB, WIDTH), "bias": (6,)}), embed),
        [blocks[kind] for kind in kinds],
        jp.HeadLoss(init({"kernel": (WIDTH + 3, VOCAB)}), head),
        tie={"blocks/dense/bias": "embed/bias"} if "d" in kinds else {},
        aux_weight=0.7,
    )


@cache
def varied_oracle(kinds: str, row_groups: int):
    """``(canonical, loss, metrics, grads)`` of the unpipelined model."""
    oracle = jp.sequential(varied_model(kinds), row_groups=row_groups)
    batch = toy_batch(ROWS * row_groups)
    canonical = oracle.init(jax.random.key(0), batch)
    step = jax.jit(oracle.value_and_grad, static_argnames="has_aux", compiler_options=QUICK)
    (loss, metrics), grads = step(canonical, batch, jax.random.key(1), has_aux=True)
    return canonical, loss, metrics, grads


def check(kinds, name, devices, repeats, microbatches, data=1, forward=False, **options):
    """Loss, metrics and gradients of a varied model against the oracle; with `forward`, without gradients too."""
    schedule = build(name, devices=devices, microbatches=microbatches, repeats=repeats)
    pipe = jp.Pipeline(varied_model(kinds), schedule=schedule, mesh=jp.make_mesh(devices, data), **options)
    canonical, loss, metrics, grads = varied_oracle(kinds, microbatches * data)
    params = pipe.from_canonical(canonical)
    batch = toy_batch(ROWS * microbatches * data)
    step = jax.jit(pipe.value_and_grad, static_argnames="has_aux", compiler_options=QUICK)
    (got, got_metrics), got_grads = step(params, batch, jax.random.key(1), has_aux=True)
    assert float(got) == pytest.approx(float(loss), rel=1e-5)
    tree_allclose(got_metrics, metrics)
    tree_allclose(pipe.to_canonical(got_grads), grads)
    if forward:
        got, got_metrics = pipe.loss(params, batch, jax.random.key(1), has_aux=True)
        assert float(got) == pytest.approx(float(loss), rel=1e-5)
        tree_allclose(got_metrics, metrics)


CASES = {
    "encoder on repeat 0, decoder on repeat 1": ("dddd" + "ssss", "interleaved_1f1b", 2, 2, 4, {}),
    "encoder and decoder on a snake": ("dd" + "ss", "zb_v", 2, 2, 4, {"remat": "none"}),
    "alternating kinds in each stage": ("dmdmdmdm", "1f1b", 4, 1, 6, {"remat": "none"}),
    "alternating kinds, one per stage": ("dmdm", "interleaved_1f1b", 2, 2, 4, {"remat": "all"}),
    "alternating kinds, backward split": ("dmdm", "zb_h1", 2, 1, 4, {"remat": "none"}),
    "all kinds, uneven, full remat": ("dmsdmms", "1f1b", 4, 1, 3, {"stages": [3, 0, 3, 1]}),
    "all kinds, uneven, backward split": ("dmsdmms", "interleaved_zb", 2, 2, 4, {"stages": [1, 3, 2, 1]}),
    "only the embedding and only the head": ("dmsd", "interleaved_1f1b", 2, 2, 5, {"stages": [0, 3, 1, 0]}),
    "a layout string": ("dmsdmms", "1f1b", 4, 1, 8, {"stages": "Et|(tt)*2|t||L".replace("||", "|t"), "remat": "none"}),
    "remat per stage": ("dmsdmms", "1f1b", 2, 1, 4, {"stages": "even", "remat": ["full", "none"]}),
    "a policy": ("dmds", "1f1b", 2, 1, 4, {"remat": jax.checkpoint_policies.dots_saveable}),
    "masked idle lanes": ("dmsdmms", "1f1b", 4, 1, 4, {"stages": [3, 0, 3, 1], "idle": "mask", "remat": "none"}),
    "scanned": ("ddddmmssdd", "interleaved_1f1b", 2, 2, 4, {"stages": [3, 2, 3, 2], "scan_blocks": True}),
    "scanned, products kept": ("ddddddd", "1f1b", 2, 1, 4, {"stages": [4, 3], "scan_blocks": True, "remat": "none"}),
    "data shards": ("dmsd", "1f1b", 2, 1, 2, {"data": 4}),
}


FORWARD = (
    "encoder on repeat 0, decoder on repeat 1",
    "encoder and decoder on a snake",
    "all kinds, uneven, full remat",
    "only the embedding and only the head",
    "masked idle lanes",
    "scanned",
    "data shards",
)
"""Cases whose forward pass is run alone too: remat and the split of backwards change nothing there."""


@pytest.mark.parametrize("name", CASES)
def test_varied_models_equal_the_oracle(name):
    kinds, schedule, devices, repeats, microbatches, options = CASES[name]
    check(kinds, schedule, devices, repeats, microbatches, forward=name in FORWARD, **options)


@pytest.mark.parametrize(
    ("stages", "name", "repeats", "remat"),
    [
        ([2, 3, 2, 1], "1f1b", 1, "full"),
        ([2, 3, 2, 1], "1f1b", 1, "none"),
        ([0, 4, 4, 0], "gpipe", 1, "none"),
        ([3, 2, 1, 2], "interleaved_1f1b", 2, "full"),
    ],
)
def test_uneven_stages_equal_the_oracle(stages, name, repeats, remat):
    devices = len(stages) // repeats
    canonical, loss, grads = toy_oracle(8, 5, 0.25, True, "float32")
    pipe = jp.Pipeline(
        toy_model(8, 0.25, True),
        schedule=build(name, devices=devices, microbatches=5, repeats=repeats),
        mesh=jp.make_mesh(devices),
        stages=stages,
        remat=remat,
    )
    params = pipe.from_canonical(canonical)
    got, got_grads = jax.jit(pipe.value_and_grad)(params, toy_batch(10), jax.random.key(1))
    assert float(got) == pytest.approx(float(loss), rel=1e-5)
    tree_allclose(pipe.to_canonical(got_grads), grads)


@pytest.mark.parametrize("scan", [False, True])
def test_init_and_round_trip_of_uneven_stages_of_several_kinds(scan):
    kinds = "dmsdmms"
    pipe = jp.Pipeline(
        varied_model(kinds),
        schedule=build("interleaved_1f1b", devices=2, microbatches=2, repeats=2),
        mesh=jp.make_mesh(2),
        stages=[1, 3, 0, 3],
        scan_blocks=scan,
    )
    batch = toy_batch(4)
    params = pipe.init(jax.random.key(0), batch)
    canonical = pipe.to_canonical(params)
    tree_allclose(canonical, jp.sequential(pipe.model, row_groups=2).init(jax.random.key(0), batch))
    again = pipe.from_canonical(canonical)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), again, params))


def test_room_of_short_stages_is_zero_and_stays_zero():
    pipe = jp.Pipeline(
        toy_model(12),
        schedule=build("1f1b", devices=4, microbatches=4),
        mesh=jp.make_mesh(4),
        stages=[3, 4, 4, 1],
    )
    batch = toy_batch(8)
    params = pipe.init(jax.random.key(0), batch)
    assert sum(leaf["up"].shape[0] for leaf in params["blocks"][0]) == 16
    tx = pipe.optimizer(optax.chain(optax.clip_by_global_norm(0.1), optax.lamb(1e-2)))
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        _, grads = pipe.value_and_grad(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, optax.tree.norm(grads)

    params, state, _ = step(params, state)
    params, state, _ = step(params, state)
    held = pipe.layout.positions[0]
    for position, tree in zip(held, params["blocks"][0], strict=True):
        for leaf in jax.tree.leaves(tree):
            assert not np.asarray(leaf)[~position.real].any() and np.asarray(leaf)[position.real].any()


def test_an_optimizer_sees_only_real_layers():
    """An optimizer that depends on the smallest entry of the model must not see the zeros of short stages."""

    def shrink(updates, state, params):
        smallest = jax.tree.reduce(jnp.minimum, jax.tree.map(lambda p: jnp.abs(p).min() + 1.0, params))
        return jax.tree.map(lambda u: u * smallest, updates), state

    tx = optax.GradientTransformation(lambda params: (), shrink)  # pyright: ignore[reportArgumentType]
    pipe = jp.Pipeline(
        toy_model(3), schedule=build("1f1b", devices=2, microbatches=2), mesh=jp.make_mesh(2), stages=[1, 2]
    )
    params = pipe.init(jax.random.key(0), toy_batch(4))
    params = jax.tree.map(lambda p: jnp.where(p == 0, p, p + jnp.sign(p)), params)
    canonical = jax.tree.map(lambda p: p.at[...].add(0), pipe.to_canonical(params))
    wrapped = pipe.optimizer(tx)
    updates, _ = wrapped.update(params, wrapped.init(params), params)
    layers = {n: jax.tree.map(lambda x, n=n: x[n], canonical["blocks"]["block"]) for n in range(3)}
    separate = {"embed": canonical["embed"], "head": canonical["head"], "layers": layers}
    expected: Any = tx.update(separate, tx.init(separate), separate)[0]
    got = pipe.to_canonical(updates)
    np.testing.assert_allclose(got["blocks"]["block"]["up"][1], expected["layers"][1]["up"], rtol=1e-6)


def test_a_loss_scale_changes_no_gradient_and_shows_overflow():
    canonical, loss, grads = toy_oracle(4, 2, 0.0, False, "float32")
    pipe = jp.Pipeline(toy_model(4), schedule=build("1f1b", devices=2, microbatches=2), mesh=jp.make_mesh(2))
    params = pipe.from_canonical(canonical)
    step = jax.jit(lambda scale: pipe.value_and_grad(params, toy_batch(4), loss_scale=scale))
    got, got_grads = step(jnp.float32(1024))
    assert float(got) == pytest.approx(float(loss), rel=1e-6)
    tree_allclose(pipe.to_canonical(got_grads), grads)
    _, too_large = step(jnp.float32(3e38))
    assert not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(too_large))
