"""Cross entropy in chunks of tokens: the numbers of whole logits, without their memory."""

from functools import partial
from typing import Any

import h100
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TOLERANCE, tree_allclose
from hlo import hlo_text, products
from jax.sharding import SingleDeviceSharding

import jaxpipe as jp
from jaxpipe.errors import ConfigError
from jaxpipe.measure.planning import gpt_shape
from jaxpipe.measure.targets import h100_devices
from jaxpipe.models.gpt import GPTConfig
from jaxpipe.ops.losses import (
    LOGITS_AT_ONCE,
    cross_entropy,
    linear_cross_entropy,
    losses_and_gradients,
    num_chunks,
    tokens_at_once,
)
from jaxpipe.ops.products import vocab_logits
from jaxpipe.plan import analytic, find_device
from jaxpipe.runtime.measure.sizes import memory_of

# Words, rows, tokens of a row, tokens at once: chunks that come out even, one more so that they do, and a short last.
CASES = [(13, 2, 6, 4), (24, 2, 6, 5), (17, 1, 7, 3), (8, 3, 5, 1), (12, 2, 3, 6)]


def given(dtype: str, words: int, rows: int, length: int, width: int = 8):
    """Kernel, features, targets and weights; where the weight is 0 the target is no word."""
    keys = jax.random.split(jax.random.key(0), 3)
    kernel, features = (
        jax.random.normal(k, s) for k, s in zip(keys, ((words, width), (rows, length, width)), strict=False)
    )
    weights = jnp.arange(rows * length).reshape(rows, length) % 4 * 0.5
    targets = jnp.where(weights == 0, -1, jax.random.randint(keys[2], (rows, length), 0, words))
    return kernel.astype(dtype), features.astype(dtype), targets, weights


def whole(kernel, features, targets, weights):
    """The loss from whole logits."""
    return cross_entropy(vocab_logits(kernel, features), targets, weights)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_chunks_give_loss_metrics_and_gradients_of_whole_logits(dtype, case):
    *sizes, chunk = case
    with jax.enable_x64(dtype == "float64"):
        kernel, features, targets, weights = given(dtype, *sizes)

        def both(loss):
            def run(kernel, features, weights):
                total, weight, metrics = loss(kernel, features, targets, weights)
                return total / weight, (weight, metrics)

            return jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(kernel, features, weights)

        actual, expected = both(partial(linear_cross_entropy, chunk=chunk)), both(whole)
        assert [g.dtype for g in actual[1]] == [g.dtype for g in expected[1]]
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            error = np.abs(np.asarray(a, float) - np.asarray(b, float)).max() / np.abs(np.asarray(b, float)).max()
            assert error <= TOLERANCE[a.dtype.name]


def test_a_target_that_counts_and_is_no_word_gives_nan():
    kernel, features, targets, weights = given("float32", 13, 2, 6)
    assert np.isfinite(linear_cross_entropy(kernel, features, targets, weights, chunk=4)[0])
    for wrong in (-1, 13):
        assert np.isnan(linear_cross_entropy(kernel, features, jnp.full_like(targets, wrong), weights, chunk=4)[0])


def test_without_weights_every_token_counts_one():
    kernel, features, targets, _ = given("float32", 13, 2, 6)
    targets = jnp.abs(targets)
    loss, weight, _ = linear_cross_entropy(kernel, features, targets, chunk=4)
    expected = -jax.nn.log_softmax(features @ kernel.T)
    np.testing.assert_allclose(loss, jnp.take_along_axis(expected, targets[..., None], -1).sum(), rtol=1e-6)
    assert weight == targets.size


def test_gradients_pass_through_recomputation_rows_and_linearization():
    kernel, features, targets, weights = given("float32", 13, 2, 6)

    def loss(features, chunk=4):
        return linear_cross_entropy(kernel, features, targets, weights, chunk=chunk)[0]

    expected = jax.grad(partial(loss, chunk=100))(features)
    out, transposed = jax.vjp(loss, features)
    found = [
        transposed(jnp.ones_like(out))[0],
        jax.grad(jax.checkpoint(loss))(features),
        jax.vmap(jax.grad(loss))(features[None])[0],
        jax.linear_transpose(jax.linearize(loss, features)[1], features)(jnp.ones_like(out))[0],
    ]
    for gradient in found:
        tree_allclose(gradient, expected)


@pytest.mark.parametrize("chunks", [1, 4])
def test_the_kernels_gradient_is_added_to_its_sum_without_rounding(chunks):
    """Rounded to bfloat16 first, as a gradient of a bfloat16 kernel is, its error is 20 times as large."""
    kernel, features, targets, _ = given("bfloat16", 64, 4, 64, 32)
    dlosses = jnp.ones(targets.shape)
    sums = jnp.full(kernel.shape, 3.0)
    targets = jnp.abs(targets)
    losses, dfeatures, total = losses_and_gradients(kernel, features, targets, dlosses, sums, chunks)
    wide = [x.astype(jnp.float32) for x in (kernel, features)]
    dlogits = jax.nn.softmax(wide[1] @ wide[0].T) - jax.nn.one_hot(targets, 64)
    exact = jnp.einsum("rtv,rtd->vd", dlogits.astype(jnp.bfloat16).astype(jnp.float32), wide[1])

    def error(gradient):
        return float(jnp.abs(gradient - exact).max() / jnp.abs(exact).max())

    assert total.dtype == jnp.float32 and losses.dtype == jnp.float32 and dfeatures.dtype == jnp.bfloat16
    assert error(total - sums) <= 1e-4
    assert error(exact.astype(jnp.bfloat16).astype(jnp.float32)) >= 20 * error(total - sums)


def test_chunks_are_as_large_as_fits_and_even_where_they_can():
    assert tokens_at_once(131072) == 512 and tokens_at_once(131072, devices=8) == 4096
    assert tokens_at_once(2 * LOGITS_AT_ONCE) == 1
    assert num_chunks(8192, 512) == 16 and num_chunks(100, 100) == 1
    assert num_chunks(12, 5) == 3 and num_chunks(10, 4) == 5 and num_chunks(7, 3) == 3


def compiled(tokens: int, words: int, width: int, at_once: int, dtype: str, place=None):
    """A compiled head: losses, the features' gradient, the kernel's added to its sum in place."""

    def shape(*dims: int, dtype: str):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=place)

    def head(sums, kernel, features, targets, dlosses):
        chunks = num_chunks(tokens, at_once)
        return losses_and_gradients(kernel, features, targets, dlosses, sums, chunks)

    sums, kernel = shape(words, width, dtype="float32"), shape(words, width, dtype=dtype)
    features, targets = shape(1, tokens, width, dtype=dtype), shape(1, tokens, dtype="int32")
    given = sums, kernel, features, targets, shape(1, tokens, dtype="float32")
    compiler: Any = {"xla_backend_optimization_level": 3}
    return jax.jit(head, donate_argnums=0).lower(*given).compile(compiler)


def test_temporaries_do_not_grow_with_the_number_of_tokens():
    words, width, at_once = 512, 16, 64
    few, many = (memory_of(compiled(n, words, width, at_once, "float32")) for n in (512, 4096))
    assert few.alias_size_in_bytes == many.alias_size_in_bytes == 4 * words * width
    logits = 4 * at_once * words
    assert few.temp_size_in_bytes <= 4 * logits
    # What is as long as the tokens and no output: their losses, before they are put in their shape.
    assert many.temp_size_in_bytes - few.temp_size_in_bytes <= 4 * 3584 * (width + 4)
    assert memory_of(compiled(4096, words, width, 4096, "float32")).temp_size_in_bytes >= 4 * 4096 * words


@pytest.mark.gpu_aot
@h100.MARKS[1]
def test_8192_tokens_of_131072_words_take_less_than_half_a_gigabyte_on_an_h100():
    words, width = 131072, 4096
    place = SingleDeviceSharding(h100_devices(1)[0])
    step = compiled(8192, words, width, tokens_at_once(words), "bfloat16", place)
    found = memory_of(step)
    sizes: Any = {"vocab_size": words, "max_seq_len": 8192, "num_layers": 1, "num_heads": 32, "d_model": width}
    planned = analytic(gpt_shape(GPTConfig(dtype="bfloat16", **sizes), 8192), find_device("h100"), rows=1)
    assert planned.head_chunks == 16 and planned.head_working_bytes == pytest.approx(found.temp_size_in_bytes, rel=0.05)
    assert found.alias_size_in_bytes == 4 * words * width
    assert found.temp_size_in_bytes < 0.5e9
    found = products(hlo_text(step))
    assert len(found) == 3 and all(operand.startswith("bf16[") for operands in found for operand in operands)


def test_it_is_what_a_head_of_plain_functions_returns():
    width, words = 8, 24

    def model(loss):
        return jp.Model(
            jp.Embed(
                lambda key, mb: {"table": jax.random.normal(key, (words, width))},
                lambda p, mb, key: p["table"][mb["tokens"]],
            ),
            [jp.Block(lambda key, x: {"up": jnp.eye(width)}, lambda p, x, mb, key: jnp.tanh(x @ p["up"]))],
            jp.HeadLoss(
                lambda key, x, mb: {"kernel": jax.random.normal(key, (words, width))},
                lambda p, x, mb, key: loss(p["kernel"], x, mb["targets"], mb["mask"]),
            ),
        )

    tokens = np.arange(24, dtype=np.int32).reshape(4, 6)
    batch = {"tokens": tokens, "targets": tokens[::-1].copy(), "mask": np.float32(tokens % 3)}
    chunked, plain = (jp.sequential(model(loss)) for loss in (partial(jp.linear_cross_entropy, chunk=5), whole))
    params = plain.init(jax.random.key(0), batch)
    tree_allclose(chunked.value_and_grad(params, batch), plain.value_and_grad(params, batch))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"kernel": jnp.ones((8, 13))},
            "kernel has shape [8, 13] but must be [vocabulary, width of the features]; try [8, 8]",
        ),
        (
            {"targets": jnp.ones((2, 5), int)},
            "targets has shape [2, 5] but must have one for each of the features; try [2, 6]",
        ),
        ({"chunk": 0}, f"chunk=0 must be at least 1 token; try {LOGITS_AT_ONCE // 13}"),
    ],
    ids=["kernel", "targets", "chunk"],
)
def test_wrong_input_is_refused(change, message):
    kernel, features, targets, _ = given("float32", 13, 2, 6)
    with pytest.raises(ConfigError) as error:
        linear_cross_entropy(**({"kernel": kernel, "features": features, "targets": targets} | change))
    assert str(error.value) == message
