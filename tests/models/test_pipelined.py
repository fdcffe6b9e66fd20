"""The reference models through the pipeline, against the same models without one."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QUICK, tree_allclose

import jaxpipe as jp
from jaxpipe.models.build import encdec_model, gpt_model
from jaxpipe.models.encdec_config import EncDecConfig
from jaxpipe.models.gpt import GPTConfig
from jaxpipe.schedule import build

VOCAB, SOURCE, TARGET, ROWS = 24, 7, 6, 2

ENCDEC: dict[str, Any] = {"vocab_size": VOCAB, "num_heads": 2, "head_dim": 4, "d_model": 8, "d_ff": 12, "dropout": 0.1}
GPT: dict[str, Any] = {"vocab_size": VOCAB, "max_seq_len": TARGET, "num_heads": 2, "d_model": 8, "dropout": 0.1}

MODELS = {
    "encdec": lambda: encdec_model(EncDecConfig(num_encoder_layers=2, num_decoder_layers=2, **ENCDEC)),
    "encdec, uneven": lambda: encdec_model(
        EncDecConfig(num_encoder_layers=4, num_decoder_layers=3, tied=False, mlp="gated-gelu", **ENCDEC)
    ),
    "encdec, rotary": lambda: encdec_model(
        EncDecConfig(num_encoder_layers=2, num_decoder_layers=2, positions="rotary", **ENCDEC)
    ),
    "moe": lambda: gpt_model(GPTConfig(num_layers=4, num_experts=3, router_z_weight=0.1, **GPT)),
    "gpt": lambda: gpt_model(GPTConfig(num_layers=4, **GPT)),
}


def batch(name: str, rows: int) -> dict[str, np.ndarray]:
    """Tokens for what a model reads: one side, or both with the source padded to different lengths."""
    rng = np.random.default_rng(0)
    lengths = 3 + np.arange(rows) % (SOURCE - 2)
    source = {
        "encoder_tokens": rng.integers(0, VOCAB, (rows, SOURCE), dtype=np.int32),
        "encoder_mask": np.arange(SOURCE)[None] < lengths[:, None],
    }
    target = {
        "tokens": rng.integers(0, VOCAB, (rows, TARGET), dtype=np.int32),
        "targets": rng.integers(0, VOCAB, (rows, TARGET), dtype=np.int32),
        "mask": (np.arange(TARGET)[None] <= np.arange(rows)[:, None] % TARGET).astype(np.float32),
    }
    return target if name in ("moe", "gpt") else source | target


@cache
def oracle(name: str, row_groups: int):
    """``(canonical, loss, metrics, grads)`` of the unpipelined model in float64."""
    model = jp.sequential(MODELS[name](), row_groups=row_groups)
    canonical = model.init(jax.random.key(0), batch(name, ROWS * row_groups))
    canonical = jax.tree.map(lambda x: x.astype(jnp.float32), canonical)
    step = jax.jit(model.value_and_grad, static_argnames="has_aux", compiler_options=QUICK)
    (loss, metrics), grads = step(canonical, batch(name, ROWS * row_groups), jax.random.key(1), has_aux=True)
    return canonical, loss, metrics, grads


CASES = [
    ("encdec", "interleaved_1f1b", 2, 2, 4, {"remat": "full"}),
    ("encdec", "zb_h1", 2, 1, 3, {"remat": "none"}),
    ("encdec", "zb_v", 2, 2, 4, {"remat": "none", "head": "vocab_parallel"}),
    ("encdec, uneven", "interleaved_1f1b", 2, 2, 2, {"remat": "none", "stages": [2, 2, 2, 1]}),
    ("encdec, rotary", "1f1b", 4, 1, 4, {"remat": "all", "head": "vocab_parallel"}),
    ("moe", "interleaved_1f1b", 2, 2, 4, {"remat": "none"}),
    ("moe", "1f1b", 2, 1, 4, {"remat": "full", "scan_blocks": True}),
    ("moe", "v_half", 2, 2, 4, {"remat": "none", "head": "vocab_parallel"}),
    ("gpt", "interleaved_1f1b", 2, 2, 4, {"remat": "full", "head": "vocab_parallel"}),
    ("gpt", "1f1b", 2, 1, 2, {"remat": "none", "scan_blocks": True}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, (*case[:5], *case[5].values()))))
def test_pipelined_reference_models_equal_the_unpipelined_ones(case):
    name, schedule, devices, repeats, microbatches, options = case
    canonical, loss, metrics, grads = oracle(name, microbatches)
    pipe = jp.Pipeline(
        MODELS[name](),
        schedule=build(schedule, devices=devices, microbatches=microbatches, repeats=repeats),
        mesh=jp.make_mesh(devices),
        **options,
    )
    params = pipe.from_canonical(canonical)
    step = jax.jit(pipe.value_and_grad, static_argnames="has_aux", compiler_options=QUICK)
    (got, got_metrics), got_grads = step(params, batch(name, ROWS * microbatches), jax.random.key(1), has_aux=True)
    assert float(got) == pytest.approx(float(loss), rel=1e-5)
    tree_allclose(got_metrics, metrics)
    tree_allclose(pipe.to_canonical(got_grads), grads)


def test_encoder_blocks_are_one_repeat_and_decoder_blocks_the_other():
    pipe = jp.Pipeline(
        MODELS["encdec"](),
        schedule=build("interleaved_1f1b", devices=2, microbatches=2, repeats=2),
        mesh=jp.make_mesh(2),
    )
    assert [[position.kind for position in row] for row in pipe.layout.positions] == [["encoder"], ["decoder"]]
