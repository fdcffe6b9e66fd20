"""What a forward keeps for its backward, and what it computes again."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import toy_batch, toy_pipeline

import jaxpipe as jp
from jaxpipe.models.build import gpt_model
from jaxpipe.models.gpt import GPTConfig
from jaxpipe.runtime.layout.casts import cast_dtypes
from jaxpipe.runtime.measure.arithmetic import arithmetic_ratio, dot_flops
from jaxpipe.runtime.stage.stage import Stage
from jaxpipe.schedule import build


def stage_of(pipe: jp.Pipeline, batch, random: bool = False) -> Stage:
    """The lanes of a pipeline."""
    params = jax.eval_shape(pipe.init, jax.random.key(0), batch)
    return pipe.program(params, batch, random=random).stages.stage


def gpt_stage(remat, dtype: Any = "bfloat16", **config: Any) -> Stage:
    """A stage of two GPT blocks."""
    cfg = GPTConfig(vocab_size=32, max_seq_len=24, num_layers=4, num_heads=2, d_model=16, dtype=dtype, **config)
    schedule = build("1f1b", devices=2, microbatches=2)
    pipe = jp.Pipeline(gpt_model(cfg), schedule=schedule, mesh=jp.make_mesh(2), remat=remat)
    tokens = jax.ShapeDtypeStruct((6, 24), jnp.int32)
    return stage_of(pipe, {"tokens": tokens, "targets": tokens})


@pytest.mark.parametrize("remat", ["none", "all"])
@pytest.mark.parametrize("config", [{}, {"positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False}])
def test_no_residual_has_the_shape_of_a_weight_or_of_its_cast(remat, config):
    stage = gpt_stage(remat, **config)
    weights = {leaf.shape for leaf in jax.tree.leaves(stage.params)}
    assert not weights & {leaf.shape for leaf in stage.residuals}
    rows = 3
    assert all(rows in leaf.shape[:2] for leaf in stage.residuals)


@pytest.mark.parametrize("remat", ["none", "all"])
def test_no_residual_is_kept_twice_and_none_is_the_stage_input(remat):
    stage = stage_of(toy_pipeline("1f1b", 2, 2, blocks=2, remat=remat), toy_batch(4))
    assert ("input", len(jax.tree.leaves(stage.params))) in stage._cut.sources
    kept = [at for kind, at in stage._cut.sources if kind == "kept"]
    assert sorted(set(kept)) == list(range(len(stage.residuals)))


def test_none_keeps_less_than_all_and_full_keeps_nothing():
    sizes = {
        remat: sum(leaf.size * leaf.dtype.itemsize for leaf in gpt_stage(remat).residuals)
        for remat in ("full", "none", "all")
    }
    assert sizes["full"] == 0 < sizes["none"] < 0.6 * sizes["all"]


@pytest.mark.parametrize(("remat", "least", "most"), [("none", 3, 3), ("all", 3, 3), ("full", 3.75, 4)])
def test_matrix_products_run_once_or_with_full_remat_twice(remat, least, most):
    stage = gpt_stage(remat, dtype="float32")
    once = dot_flops(stage.run, stage.params, stage.carry, stage.context)
    forward = dot_flops(stage.forward, stage.params, stage.carry, stage.context)
    backward = dot_flops(stage.backward, *stage.backward_shapes)
    assert forward == once > 0
    assert least * once <= forward + backward <= most * once


@pytest.mark.parametrize("remat", ["none", "all", "full"])
def test_the_whole_table_executes_no_more_than_the_model(remat):
    pipe = toy_pipeline("interleaved_1f1b", 2, 4, 2, remat=remat)
    batch = toy_batch(8)
    ratio = arithmetic_ratio(pipe, jax.eval_shape(pipe.init, jax.random.key(0), batch), batch)
    assert ratio == 1 if remat != "full" else 1 < ratio <= 4 / 3


def test_dropout_masks_are_kept_by_all_and_drawn_again_by_none():
    kinds = {}
    for remat in ("none", "all"):
        stage = stage_of(toy_pipeline("1f1b", 2, 2, remat=remat, dropout=0.5), toy_batch(4), random=True)
        assert not any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in stage.residuals)
        kinds[remat] = [leaf for leaf in stage.residuals if leaf.dtype == bool]
    assert not kinds["none"] and kinds["all"]


def test_weights_that_are_only_cast_are_cast_once_per_step():
    stage = gpt_stage("none")
    kernels = {name: leaf.dtype for name, leaf in stage.params["blocks"][0]["mlp"]["fc"].items()}
    assert kernels["kernel"] == jnp.bfloat16
    assert stage.params["blocks"][0]["norm1"]["scale"].dtype == jnp.float32


def test_a_weight_with_another_use_keeps_its_dtype():
    def run(p, x):
        return (x @ p["a"].astype(x.dtype)) + p["b"].astype(x.dtype).sum() + p["b"].sum().astype(x.dtype)

    shapes = {"a": jax.ShapeDtypeStruct((4, 4), jnp.float32), "b": jax.ShapeDtypeStruct((4,), jnp.float32)}
    found = cast_dtypes(run, shapes, jax.ShapeDtypeStruct((2, 4), jnp.bfloat16))
    assert found == {"a": jnp.bfloat16, "b": jnp.float32}


@pytest.mark.parametrize("remat", ["none", "all", "full"])
def test_splitting_the_backward_computes_no_product_twice(remat):
    stage = gpt_stage(remat, dtype="float32")
    whole = dot_flops(stage.backward, *stage.backward_shapes)
    inputs = dot_flops(stage.backward_input, *stage.backward_shapes)
    weights = dot_flops(stage.backward_weight, *stage.backward_weight_shapes)
    assert inputs + weights == whole
    once = dot_flops(stage.run, stage.params, stage.carry, stage.context)
    linear = 2 * 3 * 24 * sum(leaf.size for leaf in jax.tree.leaves(stage.params) if leaf.ndim == 2)
    assert weights == linear < once  # W: one product per weight matrix, and no other


def test_what_crosses_from_i_to_w_is_no_weight():
    stage = gpt_stage("none")
    weights = {leaf.shape for leaf in jax.tree.leaves(stage.params)}
    assert stage.weight_residuals
    assert not weights & {leaf.shape for leaf in stage.weight_residuals}
