"""The examples: short, they learn, and their gradients are those of the user's own model without a pipeline."""

from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import tree_allclose

import jaxpipe as jp

FOLDER = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
MICROBATCHES, ROWS, WIDTH = 4, 8, 8

entropy = optax.softmax_cross_entropy_with_integer_labels


@pytest.fixture(autouse=True)
def quick():
    """Everything is compiled once and run once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@cache
def example(name: str) -> Any:
    """The module of an example."""
    spec = spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pipeline(model, pipe, repeats, schedule="1f1b"):
    plan = jp.schedule.build(schedule, devices=pipe, microbatches=MICROBATCHES, repeats=repeats)
    return jp.Pipeline(model, schedule=plan, mesh=jp.make_mesh(pipe), remat="none")


def rows_of(tree, number):
    """One layer of stacked parameters."""
    return jax.tree.map(lambda leaf: leaf[number], tree)


def test_each_is_short_enough_to_read_at_once():
    assert NAMES == ["encoder_nnx", "functions", "gpt_linen", "vit_nnx"]
    lines = {name: len((FOLDER / f"{name}.py").read_text().splitlines()) for name in NAMES}
    assert max(lines.values()) <= 80, lines


@pytest.mark.parametrize(
    "name, options",
    [
        ("vit_nnx", {"pipe": 2, "layers": 2, "steps": 12}),
        ("gpt_linen", {"pipe": 2, "layers": 2, "steps": 8}),
        ("functions", {"pipe": 2, "layers": 2, "steps": 8}),
        ("encoder_nnx", {"pipe": 2, "layers": 2, "steps": 12}),
    ],
)
def test_the_loss_falls(name, options):
    losses = example(name).main(**({"layers": 4, "width": 16} | options))
    assert len(losses) == options["steps"] and np.isfinite(losses).all()
    assert np.mean(losses[-2:]) < np.mean(losses[:2]) - 0.1, losses


@pytest.mark.parametrize("pipe, repeats", [(4, 1)])
def test_gradients_of_the_vit_are_its_own(pipe, repeats):
    vit_nnx = example("vit_nnx")
    vit, batch = vit_nnx.ViT(layers=pipe * repeats, width=WIDTH, rngs=nnx.Rngs(0)), vit_nnx.make_batch(rows=ROWS)
    wrapped = vit_nnx.wrap(vit, batch)
    pipe = pipeline(wrapped.model, pipe, repeats)
    loss, grads = jax.jit(pipe.value_and_grad)(pipe.from_canonical(wrapped.canonical()), batch)

    def mean_loss(vit):
        return entropy(vit(batch["images"]), batch["labels"]).mean()

    expected, own = nnx.jit(nnx.value_and_grad(mean_loss))(vit)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    trained = wrapped.write_back(pipe.to_canonical(grads))
    tree_allclose(nnx.to_pure_dict(nnx.state(trained, nnx.Param)), nnx.to_pure_dict(own))


@pytest.mark.parametrize("pipe, repeats", [(1, 1), (2, 2)])
def test_gradients_of_the_gpt_are_its_own(pipe, repeats):
    gpt_linen, layers = example("gpt_linen"), max(2, pipe * repeats)
    batch = gpt_linen.make_batch(rows=ROWS, length=8)
    embed, block, head = gpt_linen.Embed(WIDTH), gpt_linen.Block(0.1), gpt_linen.Head()

    def mean_loss(canonical):
        table = canonical["embed"]["table"]["embedding"]
        x = embed.apply({"params": canonical["embed"]}, batch)
        for number in range(layers):
            x = block.apply({"params": rows_of(canonical["blocks"]["block"], number)}, x, deterministic=True)
        logits = head.apply({"params": canonical["head"] | {"table": table}}, x)
        return entropy(logits, batch["targets"]).mean()

    schedule = "interleaved_1f1b" if repeats > 1 else "1f1b"
    compare(pipeline(gpt_linen.make_model(layers, WIDTH), pipe, repeats, schedule), batch, mean_loss)


@pytest.mark.parametrize("pipe, repeats, schedule", [(1, 2, "interleaved_1f1b"), (2, 1, "zb_h1")])
def test_gradients_of_the_functions_are_their_own(pipe, repeats, schedule):
    functions = example("functions")
    model, batch = functions.make_model(2, WIDTH), functions.make_batch(rows=ROWS)

    def mean_loss(canonical):
        x = model.embed.apply(canonical["embed"], batch, None)
        for number, block in enumerate(model.blocks):
            x = block.apply(rows_of(canonical["blocks"]["block"], number), x, batch, None)
        loss, count = model.head_loss.apply(canonical["head"], x, batch, None)
        return loss / count

    compare(pipeline(model, pipe, repeats, schedule), batch, mean_loss)


def compare(pipe, batch, mean_loss):
    """Asserts that loss and gradients are those of a plain function of the canonical parameters."""
    params = pipe.init(jax.random.key(0), batch)
    loss, grads = jax.jit(pipe.value_and_grad)(params, batch)
    canonical = jax.tree.map(np.asarray, pipe.to_canonical(params))
    expected, own = jax.jit(jax.value_and_grad(mean_loss))(canonical)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    tree_allclose(pipe.to_canonical(grads), own)


@pytest.mark.parametrize("pipe, repeats", [(1, 1), (2, 2)])
def test_gradients_of_the_encoder_are_its_own(pipe, repeats):
    encoder_nnx = example("encoder_nnx")
    encoder = encoder_nnx.Encoder(
        max(2, pipe * repeats), WIDTH, pipe=pipe, repeats=repeats, rngs=nnx.Rngs(0, dropout=1)
    )
    encoder.eval()
    batch = encoder_nnx.make_batch(rows=ROWS)
    loss, grads = nnx.jit(nnx.value_and_grad(encoder_nnx.mean_loss))(encoder, batch)

    plain = nnx.clone(encoder)
    plain.blocks = Plain(encoder.blocks.unstacked())
    plain.eval()
    expected, own = nnx.jit(nnx.value_and_grad(encoder_nnx.mean_loss))(plain, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    own, grads = nnx.to_pure_dict(own), nnx.to_pure_dict(grads)
    blocks = own.pop("blocks")["blocks"]
    tree_allclose(grads.pop("blocks")["blocks"], jax.tree.map(lambda *x: jnp.stack(x), *blocks.values()))
    tree_allclose(grads, own)


class Plain(nnx.Module):
    """The blocks one after the other."""

    def __init__(self, blocks):
        self.blocks = nnx.List(blocks)

    def __call__(self, x, mask):
        for block in self.blocks:
            x = block(x, mask)
        return x
