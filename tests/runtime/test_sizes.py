"""What `Pipeline.sizes` says of a program, for devices that are there and for others."""

from dataclasses import replace

import h100
import jax
import jax.numpy as jnp
import pytest
from helpers import VOCAB, toy_batch, toy_pipeline

import jaxpipe as jp
from jaxpipe.models.build import gpt_model
from jaxpipe.models.gpt import GPTConfig
from jaxpipe.runtime.measure.sizes import memory_of
from jaxpipe.schedule import build


@pytest.mark.parametrize(("name", "remat"), [("1f1b", "none"), ("zb_h1", "full")])
def test_devices_on_the_axis_tensor_share_what_is_cut(name, remat):
    one, two = (toy_pipeline(name, 2, 4, blocks=2, tensor=tensor, remat=remat, width=64) for tensor in (1, 2))
    batch = toy_batch(8)
    whole, half = one.sizes(batch), two.sizes(batch)
    block, scale = 2 * (64 * 128 + 128 * 64), 2 * 64
    assert whole.stage_gradient == 4 * (block + scale)
    assert half.stage_gradient == 4 * (block // 2 + scale)
    ends = 2 * VOCAB * 64 + VOCAB
    assert (whole.ends_gradient, half.ends_gradient) == (4 * ends, 4 * ends // 2)
    assert half.carry == whole.carry
    assert half.backward < whole.backward
    kept = "residual" if remat == "none" else "weight_residual"
    assert getattr(whole, kept) / 2 < getattr(half, kept) < getattr(whole, kept)


def test_sizes_with_tensor_say_the_temporaries():
    pipe = toy_pipeline("1f1b", 2, 4, blocks=2, tensor=2, remat="none", width=64)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=pipe.batch_sharding), toy_batch(8, length=32)
    )
    params = jax.eval_shape(pipe.init, jax.random.key(0), batch)
    params = h100.placed(params, pipe.layout.shardings(params))
    sizes = pipe.sizes(batch)
    found = memory_of(jax.jit(pipe.value_and_grad).lower(params, batch).compile()).temp_size_in_bytes
    planned = sum(pipe.table.bytes(sizes).values())
    assert 0.65 * (planned - sizes.stage_gradient) <= found <= 1.05 * planned


@pytest.mark.parametrize("attention", [pytest.param("cudnn", marks=h100.MARKS), pytest.param("auto", marks=h100.MARKS)])
def test_pieces_are_compiled_for_the_devices_of_the_mesh(attention):
    """With the fused kernel, which CPUs do not have, no room is counted for scores."""
    cfg = GPTConfig(num_layers=2, max_seq_len=2048, attention=attention, **h100.SIZES)
    batch = dict.fromkeys(("tokens", "targets"), jax.ShapeDtypeStruct((2, 2048), jnp.int32))

    def sizes(cfg, mesh):
        schedule = build("1f1b", devices=2, microbatches=2)
        return jp.Pipeline(gpt_model(cfg), schedule=schedule, mesh=mesh).sizes(batch)

    fused = sizes(cfg, h100.mesh(2)).backward
    scores = 4 * cfg.num_heads * 2048 * 2048
    assert fused < scores
    assert sizes(replace(cfg, attention="xla"), h100.mesh(2)).backward > fused + scores
    assert sizes(replace(cfg, attention="xla"), jp.make_mesh(2)).backward > fused + scores
