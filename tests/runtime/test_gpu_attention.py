"""cuDNN's attention in the loops, compiled for H100s (extra `gpu-aot`); nothing runs."""

import re
from functools import partial
from typing import Any

import h100
import jax
import jax.numpy as jnp
import pytest
from hlo import computations, hlo_text, hops, loop_bodies
from jax.sharding import NamedSharding, PartitionSpec

import jaxpipe as jp
from jaxpipe.jax_internals import cudnn_checks
from jaxpipe.ops.attention import attend
from jaxpipe.runtime.layer.sweeps import Inputs, Sweeps
from jaxpipe.schedule import build

pytestmark = h100.MARKS

COLLECTIVES = r" (all-gather|reduce-scatter|all-to-all|collective-broadcast)(-start)?\("
CASES: Any = {
    "1f1b": ("1f1b", 1, {"remat": "none", "blocks": 1}),
    "zb_h1, tensor": ("zb_h1", 1, {"remat": "none", "blocks": 1, "axes": {"tensor": 2}}),
    "interleaved, all axes": (
        "interleaved_1f1b",
        2,
        {"remat": "full", "blocks": 1, "axes": {"data": 2, "fsdp": 2, "tensor": 2}},
    ),
    "zb_h1, tensor, one head of keys": (
        "zb_h1",
        1,
        {"remat": "full", "blocks": 1, "axes": {"tensor": 2}, "sizes": {"num_kv_heads": 1, "positions": "rotary"}},
    ),
}


@pytest.fixture(scope="module", params=CASES)
def step(request) -> h100.Step:
    """By default the kernel is taken."""
    name, repeats, options = CASES[request.param]
    return h100.step(name, repeats, second_stream="axes" in options, **options)


def kernels(lines: list[str]) -> tuple[int, int]:
    """How many fused kernels stand in some lines, forwards and backwards."""
    bias = "(ScaleBias)?"  # what hides keys one by one
    forwards, backwards = (
        sum(re.search(rf'"__cudnn\$fmha{bias}Softmax{way}"', line) is not None for line in lines)
        for way in ("", "Backward")
    )
    return forwards, backwards


def steady(step: h100.Step) -> list[tuple[list[str], list[str]]]:
    """Loops with hops both ways: their own lines, and those with the lanes in them."""
    own, all_ = loop_bodies(step.text), loop_bodies(step.text, inner=True)
    return [(a, b) for a, b in zip(own, all_, strict=True) if len(hops(a)) == 2]


def test_the_kernel_runs_once_each_way_and_recomputes_only_where_it_is_asked_to(step):
    forward, backward = (h100.stage_copies(step, lane, steady=True) for lane in "fb")
    again = backward if step.pipe.remats[0] == "full" else 0
    assert sum(kernels(lines)[0] for _, lines in steady(step)) == forward + again
    assert sum(kernels(lines)[1] for _, lines in steady(step)) == backward
    assert not re.search(r"f32\[\d+,\d+,96,96\]", step.text)  # no scores


def test_it_brings_no_collective_but_for_shared_keys_and_leaves_the_hops_asynchronous(step):
    assert steady(step)
    shared = "(num_heads+2*num_kv_heads)*head_width" in step.pipe.model.divisible_by_tensor
    for own, lines in steady(step):
        found = [m[1] for line in lines if (m := re.search(COLLECTIVES, line))]
        # Columns in F, and again in I; the gradient of queries in I. W has none.
        forward, backward = (h100.stage_copies(step, lane, steady=True) for lane in "fb")
        assert found == ["all-gather"] * (forward + 2 * backward if shared else 0)
        assert not [line for line in lines if "/weight_gradient/" in line and "all-gather" in line]
        assert all(hop.asynchronous and hop.behind for hop in hops(own))


def test_each_device_of_tensor_computes_its_heads(step):
    heads = 4 // step.pipe.mesh.shape["tensor"]
    found = set(re.findall(r"\(bf16\[2,(\d+),96,64\].*__cudnn", step.text))
    assert found == {str(heads)}


def block(attention, params, x):
    """A user's own block around some attention."""
    heads = (x @ params["qkv"]).reshape(*x.shape[:2], 3, -1, 64)
    y = attention(*(heads[:, :, n] for n in range(3)))
    return x + y.reshape(*x.shape[:2], -1) @ params["out"]


def test_a_users_own_call_of_the_kernel_compiles_too(monkeypatch):
    monkeypatch.setattr(cudnn_checks(), "check_cudnn_version", lambda: 91000)

    def weights(key, carry):
        return {"qkv": jnp.ones((128, 3 * 128), jnp.bfloat16), "out": jnp.ones((128, 128), jnp.bfloat16)}

    def apply(params, x, mb, key):
        return block(partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"), params, x)

    model = jp.Model(
        embed=jp.Embed(init=lambda key, mb: {}, apply=lambda params, mb, key: mb["x"]),
        blocks=[jp.Block(init=weights, apply=apply)] * 4,
        head_loss=jp.HeadLoss(
            init=lambda *_: {}, apply=lambda p, x, mb, key: (jnp.sum(x.astype(jnp.float32) ** 2), jnp.ones(()))
        ),
    )
    pipe = jp.Pipeline(model, schedule=build("1f1b", devices=4, microbatches=4), mesh=h100.mesh(4))
    batch = {"x": jax.ShapeDtypeStruct((8, 96, 128), jnp.bfloat16, sharding=pipe.batch_sharding)}
    params = jax.eval_shape(pipe.init, jax.random.key(0), batch)
    text = hlo_text(jax.jit(pipe.value_and_grad).lower(params, batch).compile())
    assert all(kernels(text.splitlines()))


def hidden(x):
    """Ways to hide keys from queries that the kernel knows, or takes as a bias."""
    rows, length = x.shape[:2]
    odd_BS = jnp.broadcast_to(jnp.arange(length) % 3 > 0, (rows, length))
    segments_BT = jnp.broadcast_to(jnp.arange(length) // 32, (rows, length))
    return {
        "causal": {"causal": True},
        "window": {"causal": True, "window": 32},
        "lengths": {"causal": False, "lengths_B": jnp.full(rows, length - 7)},
        "padding": {"causal": True, "seen_BS": odd_BS},
        "segments": {"causal": True, "segments": (segments_BT, segments_BT)},
        "mask": {"causal": False, "mask_BHTS": (segments_BT[:, :, None] >= segments_BT[:, None])[:, None]},
    }


@pytest.mark.parametrize(
    ("tensor", "how"), [(1, "causal"), (2, "causal"), *((1, how) for how in list(hidden(jnp.ones((1, 8, 1))))[1:])]
)
def test_sweeps_take_it_too(tensor, how):
    mesh = h100.mesh(2, tensor=tensor)

    def one(params, x, inputs, key):
        return block(partial(attend, **hidden(x)[how]), params, x)

    sweeps = Sweeps(one, 2, build("1f1b", devices=2, microbatches=4), mesh)
    whole = NamedSharding(mesh, PartitionSpec())

    def shape(*dims):
        return jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=whole)

    params, x = {"qkv": shape(2, 128, 3 * 128), "out": shape(2, 128, 128)}, shape(8, 96, 128)

    def step(params, x):
        return jax.grad(lambda p: jnp.sum(sweeps(p, x, Inputs({}, {}, {}), None).astype(jnp.float32) ** 2))(params)

    text = hlo_text(jax.jit(step).lower(params, x).compile())
    assert all(kernels([line for lines in computations(text).values() for line in lines]))
    assert not re.search(r"f32\[\d+,\d+,96,96\]", text)  # no scores
