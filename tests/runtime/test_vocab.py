"""A vocabulary cut over the pipe gives the same numbers as one stage that computes the head alone."""

import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import LENGTH, QUICK, ROWS, WIDTH, toy_batch, toy_model, tree_allclose
from hlo import hlo_text, loop_bodies

import jaxpipe as jp
from jaxpipe.errors import ConfigError
from jaxpipe.models.build import gpt_model
from jaxpipe.models.gpt import GPTConfig
from jaxpipe.runtime.measure.sizes import memory_of
from jaxpipe.schedule import build


def vocab_model(
    layers: int, size: int, tied: bool, dtype: str = "float32", width: int = WIDTH, chunk: int | None = None
) -> jp.Model:
    """The toy blocks between ends that can be cut by vocabulary, dropout in both."""

    def normal(key, *shape):
        return 0.4 * jax.random.normal(key, shape, dtype)

    def drop(x, key):
        return x if key is None else jnp.where(jax.random.bernoulli(key, 0.8, x.shape), x / 0.8, 0)

    def finish(p, rows, mb, key):
        return drop(rows * p["scale"][None, None] + p["at"][None, : rows.shape[1]], key)

    def features(p, x, mb, key):
        return drop(jnp.tanh(x * p["norm"]["scale"][None, None]), key)

    return jp.Model(
        jp.VocabEmbed(
            init=lambda key, mb: {
                "table": normal(key, size, width),
                "scale": jnp.ones(width, dtype),
                "at": normal(key, LENGTH, width),
            },
            table="table",
            tokens=lambda mb: mb["tokens"] % size,
            finish=finish,
        ),
        toy_model(layers, 0.2, dtype=dtype, width=width).blocks,
        jp.VocabHead(
            init=lambda key, x, mb: {
                "out": {"kernel": normal(key, size, width)},
                "norm": {"scale": jnp.ones(width, dtype)},
            },
            kernel="out/kernel",
            features=features,
            targets=lambda mb: (mb["targets"] % size, mb["mask"]),
            chunk=chunk,
        ),
        tie={"head/out/kernel": "embed/table"} if tied else {},
    )


@cache
def oracle(layers: int, size: int, tied: bool, row_groups: int, dtype: str):
    """``(canonical, loss, metrics, grads)`` of the unpipelined model."""
    model = jp.sequential(vocab_model(layers, size, tied, dtype), row_groups=row_groups)
    batch = toy_batch(ROWS * row_groups)
    canonical = model.init(jax.random.key(0), batch)
    step = jax.jit(model.value_and_grad, static_argnames="has_aux", compiler_options=QUICK)
    (loss, metrics), grads = step(canonical, batch, jax.random.key(1), has_aux=True)
    return canonical, loss, metrics, grads


# The vocabulary: 12 the pipe divides, 13 is padded and cut by width at rest, 3 is smaller than the pipe.
CASES = [
    ("interleaved_1f1b", 4, 2, 4, 12, True, "float32", 1, "skip"),
    ("interleaved_1f1b", 2, 2, 5, 13, False, "float64", 1, "skip"),
    ("1f1b", 4, 1, 4, 3, True, "float64", 1, "skip"),
    ("1f1b", 4, 1, 6, 9, False, "float32", 2, "skip"),
    ("zb_v", 2, 2, 4, 12, True, "float64", 1, "skip"),
    ("interleaved_zb", 2, 2, 4, 13, True, "float32", 2, "skip"),
    ("gpipe", 4, 1, 3, 9, True, "float32", 1, "skip"),
    ("1f1b", 1, 1, 2, 12, False, "float32", 1, "skip"),
    ("interleaved_1f1b", 2, 2, 4, 13, True, "float32", 1, "mask"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_cut_vocabulary_equals_the_oracle(case):
    name, devices, repeats, microbatches, size, tied, dtype, data, idle = case
    with jax.enable_x64(dtype == "float64"):
        canonical, loss, metrics, grads = oracle(devices * repeats, size, tied, microbatches * data, dtype)
        pipe = jp.Pipeline(
            vocab_model(devices * repeats, size, tied, dtype),
            schedule=build(name, devices=devices, microbatches=microbatches, repeats=repeats),
            mesh=jp.make_mesh(devices, data),
            head="vocab_parallel",
            remat="none",
            idle=idle,
        )
        params, batch = pipe.from_canonical(canonical), toy_batch(ROWS * microbatches * data)
        step = jax.jit(pipe.value_and_grad, static_argnames="has_aux", compiler_options=QUICK)
        (got, got_metrics), got_grads = step(params, batch, jax.random.key(1), has_aux=True)
        assert float(got) == pytest.approx(float(loss), rel=1e-5 if dtype == "float32" else 1e-12)
        tree_allclose(got_metrics, metrics)
        tree_allclose(pipe.to_canonical(got_grads), grads)
        assert float(pipe.loss(params, batch, jax.random.key(1))) == pytest.approx(float(loss), rel=1e-5)


# Of the 10 tokens of a microbatch: two chunks, four with a short last, and one token at a time.
CHUNKED = [
    ("last", "1f1b", 2, 1, 12, True, "float32", 5, "skip"),
    ("last", "zb_h1", 2, 1, 13, False, "float64", 3, "skip"),
    ("last", "interleaved_1f1b", 2, 2, 13, True, "float64", 1, "mask"),
    ("last", "1f1b", 1, 1, 9, False, "float32", 3, "skip"),
    ("vocab_parallel", "1f1b", 2, 1, 13, False, "float64", 3, "skip"),
    ("vocab_parallel", "interleaved_1f1b", 2, 2, 12, True, "float32", 5, "mask"),
    ("vocab_parallel", "zb_v", 2, 2, 3, True, "float64", 1, "skip"),
]


@pytest.mark.parametrize("case", CHUNKED, ids=lambda case: "-".join(map(str, case)))
def test_a_head_in_chunks_of_tokens_equals_the_oracle_of_whole_logits(case):
    head, name, devices, repeats, size, tied, dtype, chunk, idle = case
    with jax.enable_x64(dtype == "float64"):
        canonical, loss, metrics, grads = oracle(devices * repeats, size, tied, 4, dtype)
        pipe = jp.Pipeline(
            vocab_model(devices * repeats, size, tied, dtype, chunk=chunk),
            schedule=build(name, devices=devices, microbatches=4, repeats=repeats),
            mesh=jp.make_mesh(devices),
            head=head,
            idle=idle,
        )
        params, batch = pipe.from_canonical(canonical), toy_batch(ROWS * 4)
        step = jax.jit(pipe.value_and_grad, static_argnames="has_aux", compiler_options=QUICK)
        (got, got_metrics), got_grads = step(params, batch, jax.random.key(1), has_aux=True)
        assert float(got) == pytest.approx(float(loss), rel=1e-6 if dtype == "float32" else 1e-12)
        tree_allclose(got_metrics, metrics)
        tree_allclose(pipe.to_canonical(got_grads), grads)
        assert float(pipe.loss(params, batch, jax.random.key(1))) == pytest.approx(float(loss), rel=1e-6)
        sequential = jp.sequential(vocab_model(devices * repeats, size, tied, dtype, chunk=chunk), row_groups=4)
        again = jax.jit(sequential.value_and_grad, compiler_options=QUICK)(canonical, batch, jax.random.key(1))
        tree_allclose(again[1], grads)


def test_chunks_leave_a_kernel_cut_over_tensor_where_it_is():
    """No device gathers words, for any chunk; and the numbers stay the same."""
    cfg = GPTConfig(vocab_size=16, max_seq_len=LENGTH, num_layers=2, num_heads=2, d_model=8, tied=False)
    model = gpt_model(cfg)
    model = replace(model, head_loss=replace(model.head_loss, chunk=2))
    schedule, batch = build("1f1b", devices=2, microbatches=4), toy_batch(ROWS * 4)
    pipe = jp.Pipeline(model, schedule=schedule, mesh=jp.make_mesh(2, tensor=2))
    params = pipe.init(jax.random.key(0), batch)
    step = jax.jit(pipe.value_and_grad).lower(params, batch).compile(QUICK)
    expected = jp.sequential(gpt_model(cfg), row_groups=4).value_and_grad(pipe.to_canonical(params), batch)
    loss, grads = step(params, batch)
    tree_allclose((loss, pipe.to_canonical(grads)), expected)
    heads = [line for body in loop_bodies(hlo_text(step), inner=True) for line in body if "/head/" in line]
    assert any(" all-reduce" in line for line in heads)
    assert not any(" all-gather" in line or " all-to-all" in line for line in heads)


def compiled(head: str, size: int = 4096, width: int = 32):
    """A compiled step whose ends are most of the model."""
    pipe = jp.Pipeline(
        vocab_model(4, size, False, width=width),
        schedule=build("1f1b", devices=4, microbatches=8),
        mesh=jp.make_mesh(4),
        head=head,  # pyright: ignore[reportArgumentType]
    )
    batch = toy_batch(16)
    params = pipe.init(jax.random.key(0), batch)
    return pipe, jax.jit(pipe.value_and_grad).lower(params, batch).compile(), batch


def test_memory_no_longer_piles_up_on_one_device():
    size, width = 4096, 32
    table = size * width * 4
    sizes = {}
    for head in ("last", "vocab_parallel"):
        pipe, step, batch = compiled(head, size, width)
        sizes[head] = memory_of(step).temp_size_in_bytes
        planned = sum(pipe.table.bytes(pipe.sizes(batch)).values())
        assert sizes[head] <= 1.2 * planned
    # Table, kernel and the gradients of both: three quarters of each are gone.
    assert sizes["last"] - sizes["vocab_parallel"] >= 0.9 * 4 * 0.75 * table


def test_only_the_cut_vocabulary_reduces_inside_the_loop():
    bodies = loop_bodies(hlo_text(compiled("vocab_parallel")[1]), inner=True)
    assert any(" all-reduce" in line for body in bodies for line in body)
    assert not any(" all-gather" in line or " all-to-all" in line for body in bodies for line in body)


def test_lanes_of_a_tick_have_names_of_their_own():
    """What `jaxpipe.runtime.measure.traffic` tells lanes apart by."""
    found = re.findall(r'op_name="[^"]*/(\w+)/branch_0/while"', hlo_text(compiled("vocab_parallel")[1]))
    assert set(found) == {"embed", "forward", "head", "backward", "embed_gradient"}


def test_out_of_range_tokens_and_targets_give_nan():
    model = vocab_model(2, 12, False)
    for field in ("tokens", "targets"):
        pipe = jp.Pipeline(
            model, schedule=build("1f1b", devices=2, microbatches=2), mesh=jp.make_mesh(2), head="vocab_parallel"
        )
        object.__setattr__(model.embed, "tokens", lambda mb: mb["tokens"])
        object.__setattr__(model.head_loss, "targets", lambda mb: (mb["targets"], mb["mask"]))
        batch = toy_batch(4)
        params = pipe.init(jax.random.key(0), batch)
        assert np.isfinite(float(pipe.loss(params, batch)))
        batch[field] = batch[field] + 12
        assert np.isnan(float(pipe.loss(params, batch)))
        assert np.isnan(float(jp.sequential(model).loss(pipe.to_canonical(params), batch)))


def test_models_that_are_not_made_for_it_are_refused():
    schedule, mesh = build("1f1b", devices=2, microbatches=2), jp.make_mesh(2)
    with pytest.raises(ConfigError) as error:
        jp.Pipeline(toy_model(2), schedule=schedule, mesh=mesh, head="vocab_parallel")
    assert str(error.value) == (
        "head='vocab_parallel' needs a model whose head_loss is a VocabHead, not HeadLoss; try head='last'"
    )
    good = vocab_model(2, 12, True)
    other = jp.Model(toy_model(2).embed, good.blocks, good.head_loss, tie=good.tie)
    with pytest.raises(ConfigError, match="needs a VocabEmbed with table='table', not Embed; try head='last'"):
        jp.Pipeline(other, schedule=schedule, mesh=mesh, head="vocab_parallel")
    shared = jp.Model(good.embed, good.blocks, good.head_loss, tie={"blocks/block/up": "embed/table"})
    with pytest.raises(ConfigError) as error:
        jp.Pipeline(shared, schedule=schedule, mesh=mesh, head="vocab_parallel")
    assert str(error.value) == (
        "head='vocab_parallel' cuts 'embed/table' by vocabulary, which tie={'blocks/block/up': 'embed/table'} needs "
        "whole; try head='last'"
    )
    with pytest.raises(ConfigError, match="head='first' must be 'last' or 'vocab_parallel'; try 'last'"):
        jp.Pipeline(good, schedule=schedule, mesh=mesh, head="first")  # pyright: ignore[reportArgumentType]
