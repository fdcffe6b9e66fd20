"""The examples: short, they learn, and their gradients are those of the user's own model without a pipeline."""

from functools import cache, partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import pairwise, tree_allclose

import jaxpipe as jp
from jaxpipe.nn import Pipelined, from_nnx, linen

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


def test_each_is_short_enough_to_read_at_once():
    assert NAMES == ["encoder_nnx", "functions", "gpt_linen", "vit_nnx"]
    lines = {name: len((FOLDER / f"{name}.py").read_text().splitlines()) for name in NAMES}
    assert max(lines.values()) <= 80, lines


@pytest.mark.parametrize("name, steps", [("vit_nnx", 12), ("gpt_linen", 8), ("functions", 8), ("encoder_nnx", 12)])
def test_the_loss_falls(name, steps):
    losses = example(name).main(pipe=2, layers=2, width=16, steps=steps)
    assert len(losses) == steps and np.isfinite(losses).all()
    assert np.mean(losses[-2:]) < np.mean(losses[:2]) - 0.1, losses


CASES = list(
    pairwise(
        {"name": NAMES, "api": ("Pipeline", "Pipelined"), "pipe": (1, 2, 4), "repeats": (1, 2)}, legal=lambda case: True
    )
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_gradients_are_those_of_the_unwrapped_model(case):
    both = {"Pipeline": PIPELINES, "Pipelined": LAYERS}[case["api"]]
    (loss, grads), (expected, own) = both[case["name"]](case["pipe"], case["repeats"])
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    tree_allclose(grads, own)


# `Pipeline`: the loss is inside.


def pipeline(model, pipe, repeats, split=False):
    name = "interleaved_1f1b" if repeats > 1 else "zb_h1" if split else "1f1b"
    plan = jp.schedule.build(name, devices=pipe, microbatches=MICROBATCHES, repeats=repeats)
    return jp.Pipeline(model, schedule=plan, mesh=jp.make_mesh(pipe), remat="none")


def of_canonical(pipe, batch, mean_loss):
    """Loss and gradients by the pipeline, and by a plain function of the canonical parameters."""
    params = pipe.init(jax.random.key(0), batch)
    loss, grads = jax.jit(pipe.value_and_grad)(params, batch)
    canonical = jax.tree.map(np.asarray, pipe.to_canonical(params))
    return (loss, pipe.to_canonical(grads)), jax.jit(jax.value_and_grad(mean_loss))(canonical)


def of_wrapped(wrapped, pipe, repeats, batch, mean_loss):
    """The same for a model from `from_nnx`, as the user's own tree."""
    pipe = pipeline(wrapped.model, pipe, repeats)
    loss, grads = jax.jit(pipe.value_and_grad)(pipe.from_canonical(wrapped.canonical()), batch)
    expected, own = nnx.jit(nnx.value_and_grad(mean_loss))(wrapped.module, batch)
    own_grads = nnx.state(wrapped.write_back(pipe.to_canonical(grads)), nnx.Param)
    return (loss, stacked(own_grads)), (expected, stacked(own))


def stacked(state):
    """A state as dicts, with the members of its lists of blocks stacked."""

    def stack(tree):
        if not isinstance(tree, dict):
            return tree
        if all(isinstance(name, int) for name in tree):
            return jax.tree.map(lambda *x: jnp.stack(x), *tree.values())
        return {name: stack(value) for name, value in tree.items()}

    return stack(nnx.to_pure_dict(state))


def rows_of(tree, number):
    """One layer of stacked parameters."""
    return jax.tree.map(lambda leaf: leaf[number], tree)


def num_layers(pipe, repeats):
    return max(2, pipe * repeats)


def vit_pipeline(pipe, repeats):
    vit_nnx = example("vit_nnx")
    vit, batch = vit_nnx.ViT(num_layers(pipe, repeats), WIDTH, nnx.Rngs(0)), vit_nnx.make_batch(rows=ROWS)

    def mean_loss(vit, batch):
        return entropy(vit(batch["images"]), batch["labels"]).mean()

    return of_wrapped(vit_nnx.wrap(vit, batch), pipe, repeats, batch, mean_loss)


def encoder_pipeline(pipe, repeats):
    encoder_nnx = example("encoder_nnx")
    batch, encoder = encoder_nnx.make_batch(rows=ROWS), make_encoder(1, 1, num_layers(pipe, repeats))
    encoder.blocks = Plain(encoder.blocks.unstacked())
    encoder.eval()

    def head(encoder, x, mb):
        return encoder.out(encoder.norm(x).mean(axis=1, where=(mb["tokens"] < 4)[:, :, None]))

    wrapped = from_nnx(
        encoder,
        blocks="blocks.blocks",
        embed=lambda encoder, mb: encoder.table(mb["tokens"]),
        head=head,
        loss=lambda logits, mb: (entropy(logits, mb["labels"]).sum(), np.float32(len(logits))),
        block_call=lambda block, x, mb: block(x, (mb["tokens"] < 4)[:, None, None]),
        batch=batch,
    )
    return of_wrapped(wrapped, pipe, repeats, batch, encoder_nnx.mean_loss)


def gpt_loss(params, batch, blocks):
    """The mean loss of the GPT, deterministic, with ``blocks(params, x)`` between its embedding and its head."""
    gpt_linen = example("gpt_linen")
    x = blocks(params["blocks"]["block"], gpt_linen.Embed(WIDTH).apply({"params": params["embed"]}, batch))
    head = params["head"] | {"table": params["embed"]["table"]["embedding"]}
    return entropy(gpt_linen.Head().apply({"params": head}, x), batch["targets"]).mean()


def gpt_loop(stacked, x):
    for number in range(len(jax.tree.leaves(stacked)[0])):
        x = example("gpt_linen").Block(0.1).apply({"params": rows_of(stacked, number)}, x, deterministic=True)
    return x


def gpt_pipeline(pipe, repeats):
    gpt_linen = example("gpt_linen")
    model, batch = gpt_linen.make_model(num_layers(pipe, repeats), WIDTH), gpt_linen.make_batch(rows=ROWS, length=8)
    return of_canonical(pipeline(model, pipe, repeats), batch, partial(gpt_loss, batch=batch, blocks=gpt_loop))


def functions_loss(canonical, batch, model):
    x = model.embed.apply(canonical["embed"], batch, None)
    for number, block in enumerate(model.blocks):
        x = block.apply(rows_of(canonical["blocks"]["block"], number), x, batch, None)
    loss, count = model.head_loss.apply(canonical["head"], x, batch, None)
    return loss / count


def functions_pipeline(pipe, repeats):
    functions = example("functions")
    model, batch = functions.make_model(num_layers(pipe, repeats), WIDTH), functions.make_batch(rows=ROWS)
    return of_canonical(
        pipeline(model, pipe, repeats, split=True), batch, partial(functions_loss, batch=batch, model=model)
    )


# `Pipelined`: a layer within the user's model.


class Plain(nnx.Module):
    """The blocks one after the other."""

    def __init__(self, blocks):
        self.blocks = nnx.List(blocks)

    def __call__(self, x, *inputs):
        for block in self.blocks:
            x = block(x, *inputs)
        return x


def layer(block, pipe, repeats):
    options: Any = {"mesh": jp.make_mesh(pipe), "microbatches": MICROBATCHES, "repeats": repeats}
    return Pipelined(block, num_layers=num_layers(pipe, repeats), rngs=nnx.Rngs(0), **options)


def of_layer(net, batch, mean_loss):
    """Loss and gradients of a module that holds a layer as `blocks`, and of the same with the blocks in a list."""
    plain = nnx.clone(net)
    plain.blocks = Plain(net.blocks.unstacked())
    plain.eval()
    loss, grads = nnx.jit(nnx.value_and_grad(mean_loss))(net, batch)
    expected, own = nnx.jit(nnx.value_and_grad(mean_loss))(plain, batch)
    return (loss, nnx.to_pure_dict(grads)), (expected, stacked(own))


def vit_layer(pipe, repeats):
    vit_nnx = example("vit_nnx")
    vit, batch = vit_nnx.ViT(0, WIDTH, nnx.Rngs(0)), vit_nnx.make_batch(rows=ROWS)
    vit.blocks = layer(partial(vit_nnx.Block, WIDTH), pipe, repeats)

    def mean_loss(vit, batch):
        return entropy(vit.head(vit.blocks(vit.embed(batch["images"]))), batch["labels"]).mean()

    return of_layer(vit, batch, mean_loss)


def make_encoder(pipe, repeats, layers):
    options = {"pipe": pipe, "repeats": repeats, "rngs": nnx.Rngs(0, dropout=1)}
    return example("encoder_nnx").Encoder(layers, WIDTH, **options)


def encoder_layer(pipe, repeats):
    encoder_nnx, encoder = example("encoder_nnx"), make_encoder(pipe, repeats, num_layers(pipe, repeats))
    encoder.eval()
    return of_layer(encoder, encoder_nnx.make_batch(rows=ROWS), encoder_nnx.mean_loss)


def gpt_layer(pipe, repeats):
    gpt_linen, layers = example("gpt_linen"), num_layers(pipe, repeats)
    batch = gpt_linen.make_batch(rows=ROWS, length=8)
    params = jp.sequential(gpt_linen.make_model(layers, WIDTH)).init(jax.random.key(0), batch)
    block = linen.Pipelined(
        gpt_linen.Block(0.1), layers, mesh=jp.make_mesh(pipe), microbatches=MICROBATCHES, repeats=repeats
    )

    def pipelined(stacked, x):
        return block.apply({"params": {"blocks": stacked}}, x)

    return tuple(
        jax.jit(jax.value_and_grad(partial(gpt_loss, batch=batch, blocks=blocks)))(params)
        for blocks in (pipelined, gpt_loop)
    )


def functions_layer(pipe, repeats):
    functions = example("functions")
    model, batch = functions.make_model(1, WIDTH), functions.make_batch(rows=ROWS)
    block = model.blocks[0]

    class Own(nnx.Module):
        """A block of plain functions, which holds its parameters in an attribute each."""

        def __init__(self, rngs):
            self.names = tuple(own := block.init(rngs.params(), None))
            for name, value in own.items():
                setattr(self, name, nnx.Param(value))

        def __call__(self, x):
            return block.apply({name: getattr(self, name)[...] for name in self.names}, x, None, None)

    class Net(nnx.Module):
        def __init__(self):
            self.table, self.positions = map(nnx.Param, model.embed.init(jax.random.key(1), batch).values())
            self.blocks = layer(Own, pipe, repeats)
            self.kernel = nnx.Param(model.head_loss.init(jax.random.key(2), None, batch)["kernel"])

    def mean_loss(net, batch):
        embed = {"table": net.table[...], "positions": net.positions[...]}
        x = net.blocks(model.embed.apply(embed, batch, None))
        loss, count = model.head_loss.apply({"kernel": net.kernel[...]}, x, batch, None)
        return loss / count

    return of_layer(Net(), batch, mean_loss)


PIPELINES = {
    "vit_nnx": vit_pipeline,
    "encoder_nnx": encoder_pipeline,
    "gpt_linen": gpt_pipeline,
    "functions": functions_pipeline,
}
LAYERS = {"vit_nnx": vit_layer, "encoder_nnx": encoder_layer, "gpt_linen": gpt_layer, "functions": functions_layer}
