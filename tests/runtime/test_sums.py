"""What is added up over microbatches and devices: in which dtype, and by which collectives."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QUICK, toy_batch, toy_model, tree_allclose

import jaxpipe as jp
from jaxpipe.models.build import gpt_model
from jaxpipe.models.gpt import GPTConfig
from jaxpipe.runtime.layer.sweep_loops import Inputs
from jaxpipe.runtime.layer.sweeps import Sweeps
from jaxpipe.schedule import build

ROWS = 16


def with_metrics(model: jp.Model, metrics: Any) -> jp.Model:
    """The model with other metrics: ``metrics(loss, mb)``."""
    head = model.head_loss

    def apply(params, carry, mb, key):
        loss, weight, *_ = head.apply(params, carry, mb, key)
        return loss, weight, metrics(loss, mb)

    return replace(model, head_loss=jp.HeadLoss(head.init, apply))


def pipeline(model: jp.Model, data: int = 1, tensor: int = 1, **options: Any) -> jp.Pipeline:
    """Two stages and 4 row groups on the whole."""
    plan = build("1f1b", devices=2, microbatches=4 // data)
    return jp.Pipeline(model, schedule=plan, mesh=jp.make_mesh(2, data=data, tensor=tensor), **options)


@pytest.mark.parametrize("data", [1, 2])
def test_metrics_of_all_dtypes_are_added_up_without_loss(data):
    """Numbers are counted in 32 bits or more; rows come back as they are."""

    def metrics(loss, mb):
        tokens, big = mb["tokens"], jnp.sum(mb["tokens"] >= 0)
        numbers = {"bool": loss > 0, "int8": jnp.int8(100), "uint8": jnp.uint8(200), "python": 1, "float": 0.5}
        numbers |= {name: jnp.asarray(big, name) for name in ("int16", "uint32", "int32", "float16", "bfloat16")}
        rows = {name: tokens.astype(name) for name in ("bool", "int8", "uint16", "bfloat16", "float16", "float32")}
        return {"number": numbers, "row": rows | {"flat": tokens[:, 0] > 3}}

    pipe = pipeline(with_metrics(toy_model(2), metrics), data=data)
    batch = toy_batch(ROWS)
    params = pipe.init(jax.random.key(0), batch)
    oracle = jp.sequential(pipe.model, 4)
    run = jax.jit(pipe.value_and_grad, static_argnames="has_aux", compiler_options=QUICK)
    (_, found), _ = run(params, batch, has_aux=True)
    tree_of_dtypes = jax.tree.map(lambda x: str(x.dtype), found)
    counted = dict.fromkeys(("bool", "int8", "uint8", "python", "int16", "int32"), "int32")
    wide = dict.fromkeys(("float", "float16", "bfloat16"), "float32")
    assert tree_of_dtypes["number"] == counted | wide | {"uint32": "uint32"}
    assert tree_of_dtypes["row"] == {name: name for name in found["row"] if name != "flat"} | {"flat": "bool"}
    per_group = batch["tokens"].size // 4
    for name, number in {"bool": 1, "int8": 100, "uint8": 200, "python": 1, "float": 0.5}.items():
        assert found["number"][name] == 4 * number
    assert all(found["number"][name] == 4 * per_group for name in ("int16", "uint32", "int32", "float16", "bfloat16"))
    for name, rows in found["row"].items():
        expected = batch["tokens"][:, 0] > 3 if name == "flat" else jnp.asarray(batch["tokens"]).astype(name)
        np.testing.assert_array_equal(np.asarray(rows, float), np.asarray(expected, float))
    evaluated = pipe.loss(params, batch, has_aux=True)[1]
    plain = oracle.loss(pipe.to_canonical(params), batch, has_aux=True)[1]
    for other in (evaluated, plain):
        assert jax.tree.map(lambda x: (str(x.dtype), np.asarray(x, float).tolist()), other) == jax.tree.map(
            lambda x: (str(x.dtype), np.asarray(x, float).tolist()), found
        )


def test_the_losss_dtype_is_its_own():
    """Not that of the parameter whose name sorts first; and a scale that float32 does not hold is one number."""
    with jax.enable_x64(True):
        toy = toy_model(2, dtype="float64")

        def aux(p, x, mb, key):
            return toy.blocks[0].apply(p, x, mb, key), 0.1 * (x**2).mean()

        def embed(key, mb):
            return toy.embed.init(key, mb) | {"a": jnp.ones((), jnp.float32)}

        blocks = [replace(block, apply=aux) for block in toy.blocks]
        model = replace(toy, embed=replace(toy.embed, init=embed), blocks=blocks)
        pipe, batch = pipeline(model), toy_batch(ROWS)
        params = pipe.init(jax.random.key(0), batch)
        expected = jp.sequential(model, 4).value_and_grad(pipe.to_canonical(params), batch)
        assert expected[0].dtype == jnp.float64
        run = jax.jit(pipe.value_and_grad, static_argnames="loss_scale", compiler_options=QUICK)
        for scale in (None, 0.1):
            loss, grads = run(params, batch, loss_scale=scale)
            tree_allclose((loss, pipe.to_canonical(grads)), expected)


def reductions(jaxpr: Any) -> list:
    """The dtypes that collectives of a program add up or compare."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name.startswith(("psum", "pmax", "pmin", "reduce_scatter")):
            found += [v.aval.dtype for v in eqn.invars]
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                found += reductions(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize("shard", ["params", "optimizer"])
@pytest.mark.parametrize("head", ["last", "vocab_parallel"])
def test_no_collective_adds_up_16_bits_on_cpus(head, shard):
    """XLA's CPU backend ends the process over such a sum where the compiler has an axis left."""
    cfg = GPTConfig(
        vocab_size=12, max_seq_len=5, num_layers=2, num_heads=2, d_model=8, dtype="bfloat16", param_dtype="bfloat16"
    )
    model = gpt_model(cfg)
    if head == "last":
        model = with_metrics(model, lambda loss, mb: {"number": loss.astype("bfloat16"), "row": mb["mask"]})
    plan = build("1f1b", devices=2, microbatches=2)
    pipe = jp.Pipeline(model, schedule=plan, mesh=jp.make_mesh(2, fsdp=2, tensor=2), head=head, shard=shard)
    batch = toy_batch(8)
    batch = batch | {"mask": jnp.asarray(batch["mask"], jnp.bfloat16)}
    params = jax.eval_shape(pipe.init, jax.random.key(0), batch)
    program = jax.make_jaxpr(lambda *given: pipe.value_and_grad(*given, has_aux=True))(params, batch)
    found = reductions(program.jaxpr)
    assert len(found) > 5
    assert all(jnp.dtype(dtype).itemsize >= 4 for dtype in found)


def test_a_bfloat16_metric_runs_beside_an_axis_of_the_compiler():
    model = with_metrics(
        toy_model(2), lambda loss, mb: {"n": loss.astype("bfloat16"), "r": mb["mask"].astype("bfloat16")}
    )
    pipe, batch = pipeline(model, tensor=2), toy_batch(ROWS)
    params = pipe.init(jax.random.key(0), batch)
    metrics = pipe.loss(params, batch, has_aux=True)[1]
    np.testing.assert_array_equal(np.asarray(metrics["r"], float), batch["mask"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_pipelined_layer_adds_up_no_16_bits_on_cpus(dtype):
    """Outputs, gradients of what rides along and of what blocks share."""

    def block(params, x, inputs, key):
        scale = inputs.shared["scale"].astype(dtype)[None]
        return jnp.where(inputs.resting[:, None], x @ params["w"] + inputs.riding * scale, x)

    mesh = jp.make_mesh(2, data=2, tensor=2)
    sweeps = Sweeps(block, 2, build("1f1b", devices=2, microbatches=2), mesh)
    x = jnp.ones((ROWS, 4), dtype)

    def loss(params, x, riding, scale):
        inputs = Inputs(riding, jnp.ones(ROWS, bool), {"scale": scale})
        return sweeps(params, x, inputs).astype(jnp.float32).sum()

    given = {"w": jnp.ones((2, 4, 4), dtype)}, x, x, jnp.ones(4, dtype)
    found = reductions(jax.make_jaxpr(jax.grad(loss, (0, 1, 2, 3)))(*given).jaxpr)
    assert len(found) >= 4
    assert all(jnp.dtype(each).itemsize >= 4 for each in found)
