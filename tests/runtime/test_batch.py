"""What a batch holds: reference models refuse what they do not read, others are told of it once."""

import warnings
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from helpers import toy_batch, toy_model

import jaxpipe as jp
from jaxpipe.errors import ConfigError
from jaxpipe.flax_nnx import nnx
from jaxpipe.models.build import encdec_model, gpt_model
from jaxpipe.models.encdec import PRESETS as ENCDECS
from jaxpipe.models.gpt import PRESETS
from jaxpipe.nn import from_nnx, linen_model, nnx_model
from jaxpipe.schedule import build

ROWS, WORDS, WIDTH = 8, 12, 4
TOKENS = np.zeros((ROWS, 5), np.int32)
EXTRA = np.ones((ROWS, 5), np.float32)


def pipeline(model: jp.Model) -> jp.Pipeline:
    """Two stages."""
    return jp.Pipeline(model, schedule=build("1f1b", devices=2, microbatches=2), mesh=jp.make_mesh(2))


@pytest.mark.parametrize("name", ["segment_ids", "positions", "attention_mask", "loss_mask", "Mask"])
@pytest.mark.parametrize("model", [gpt_model(PRESETS["tiny"]), encdec_model(ENCDECS["tiny"])], ids=["gpt", "encdec"])
def test_a_reference_model_refuses_what_it_does_not_read(model, name):
    batch = {key: TOKENS for key, needed in model.batch.items() if needed}
    params = jax.eval_shape(pipeline(model).init, jax.random.key(0), batch)
    wrong = batch | {name: EXTRA}
    canonical = jax.eval_shape(jp.sequential(model).init, jax.random.key(0), batch)
    for call in (
        lambda: pipeline(model).init(jax.random.key(0), wrong),
        lambda: jax.eval_shape(pipeline(model).value_and_grad, params, wrong),
        lambda: pipeline(model).loss(params, wrong),
        lambda: jp.sequential(model).init(jax.random.key(0), wrong),
        lambda: jax.eval_shape(jp.sequential(model).loss, canonical, wrong),
    ):
        with pytest.raises(ConfigError, match=rf"^batch\['{name}'\] is not read by this model, which reads .*'mask'"):
            call()


def test_what_a_reference_model_needs_is_asked_for_and_nearest_names_are_told():
    pipe = pipeline(gpt_model(PRESETS["tiny"]))
    params = jax.eval_shape(pipe.init, jax.random.key(0), {"tokens": TOKENS})  # which needs no targets
    batch: Any
    for batch, message in (
        ({"tokens": TOKENS}, "batch has 'tokens' but this model needs 'targets'; it reads 'tokens', 'targets', 'mask'"),
        ((TOKENS, TOKENS), "batch is a tuple but must be a dict; this model reads 'tokens', 'targets', 'mask'"),
        (
            {"tokens": TOKENS, "targets": TOKENS, "loss_mask": EXTRA},
            "batch['loss_mask'] is not read by this model, which reads 'tokens', 'targets', 'mask'; try 'mask', or "
            "leave it out",
        ),
    ):
        with pytest.raises(ConfigError) as error:
            jax.eval_shape(pipe.value_and_grad, params, batch)
        assert str(error.value) == message


@pytest.mark.parametrize("shape", [(ROWS, 1), (ROWS,), (ROWS, 4)], ids=str)
def test_a_mask_of_another_shape_than_the_targets_is_refused(shape):
    model = replace(gpt_model(PRESETS["tiny"]), batch={})
    batch = {"tokens": TOKENS, "targets": TOKENS}
    canonical = jax.eval_shape(jp.sequential(model).init, jax.random.key(0), batch)
    mask = np.ones(shape, np.float32)
    with pytest.raises(ConfigError, match=r"must have that of the targets; try \[8, 5\]"):
        jax.eval_shape(jp.sequential(model).loss, canonical, batch | {"mask": mask})


def square(y: Any, mb: Any) -> Any:
    """A loss that reads `x`, and the rows of `size`."""
    return ((y[..., 0] - mb["x"]) ** 2).sum(), mb["size"].size


class Noisy(nnx.Module):
    """A table, layers and a way out, which adds noise where there is a key."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2)])
        self.out = nnx.Linear(WIDTH, 1, rngs=rngs)


def plain() -> jp.Model:
    """Of plain functions: `noise` is read with a key only, `both` by a block, `shift` in a metric, `deep` in a tree."""

    def embed(p, mb, key):
        x = mb["x"][..., None] * p["w"][None, None]
        return x if key is None else x + mb["noise"][..., None]

    def head(p, carry, mb, key):
        loss, weight = square(carry * p["w"][None, None], mb)
        return loss, weight, {"shift": mb["deep"]["shift"]}

    def init(key, *_):
        return {"w": jnp.ones(WIDTH)}

    block = jp.Block(init, lambda p, x, mb, key: x * p["w"][None, None] + mb["both"][..., None])
    return jp.Model(jp.Embed(init, embed), [block] * 2, jp.HeadLoss(init, head))


def of_linen() -> jp.Model:
    """The same of Linen modules."""
    return linen_model(
        embed=linen.Dense(WIDTH),
        block=linen.Dense(WIDTH),
        num_layers=2,
        head=linen.Dense(1),
        loss=square,
        embed_call=lambda module, mb, deterministic: module(mb["x"][..., None]),
    )


def of_nnx() -> jp.Model:
    """The same of NNX modules."""
    return nnx_model(
        embed=lambda rngs: nnx.Linear(1, WIDTH, rngs=rngs),
        block=lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs),
        num_layers=2,
        head=lambda rngs: nnx.Linear(WIDTH, 1, rngs=rngs),
        loss=square,
        embed_call=lambda module, mb: module(mb["x"][..., None]),
    )


def wrapped() -> jp.Model:
    """The same of a model that exists."""
    batch = {name: jax.ShapeDtypeStruct(EXTRA.shape, jnp.float32) for name in ("x", "size")}
    return from_nnx(
        Noisy(nnx.Rngs(0)),
        blocks="layers",
        embed=lambda module, mb: module.table(mb["x"].astype(int)),
        head=lambda module, carry, mb: module.out(carry),
        loss=square,
        batch=batch,
    ).model


@pytest.mark.parametrize(
    ("make", "read"),
    [(plain, ("noise", "both", "deep")), (of_linen, ()), (of_nnx, ()), (wrapped, ())],
    ids=["functions", "linen", "nnx", "from_nnx"],
)
def test_leaves_that_nobody_reads_are_told_once(make, read):
    batch: dict[str, Any] = {name: EXTRA for name in ("x", "size", *read)}
    if "deep" in batch:
        batch["deep"] = {"shift": EXTRA}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pipe = pipeline(make())
        params = pipe.init(jax.random.key(0), batch)
        for key in (None, jax.random.key(1)):
            jax.eval_shape(pipe.value_and_grad, params, batch, key)
        assert [str(each.message) for each in told] == []
        for _ in range(2):
            jax.eval_shape(pipe.value_and_grad, params, batch | {"segment_ids": EXTRA, "tree": {"mask": EXTRA}})
    assert len(told) == 1
    assert str(told[0].message).startswith(
        "no function of the model reads batch['segment_ids'], batch['tree']['mask'], which has no effect; try"
    )


def test_a_batch_that_is_no_dict_is_looked_through_too():
    """The second of three leaves is read by nobody; of the third only the shape is, when parameters are made."""
    toy = toy_model(2)
    block = toy.blocks[0]

    def init(key, mb):
        return toy.embed.init(key, None) | {"extra": jnp.zeros(mb[2].shape[1:])}

    model = replace(
        toy,
        embed=jp.Embed(init, lambda p, mb, key: toy.embed.apply(p, mb[0], key) + 0 * p["extra"].sum()),
        blocks=[replace(block, apply=lambda p, x, mb, key: block.apply(p, x, mb[0], key))] * 2,
        head_loss=jp.HeadLoss(toy.head_loss.init, lambda p, x, mb, key: toy.head_loss.apply(p, x, mb[0], key)),
    )
    pipe, batch = pipeline(model), (toy_batch(ROWS), EXTRA, EXTRA)
    params = jax.eval_shape(pipe.init, jax.random.key(0), batch)
    with pytest.warns(UserWarning, match=r"^no function of the model reads batch\[1\], which"):
        jax.eval_shape(pipe.value_and_grad, params, batch)
