"""The reference models over the axis `tensor`: the numbers of one device, and Megatron's collectives."""

import re
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from helpers import QUICK, tree_allclose
from hlo import hlo_text, loop_bodies

import jaxpipe as jp
from jaxpipe.errors import ConfigError
from jaxpipe.models.build import encdec_model, gpt_model
from jaxpipe.models.encdec_config import EncDecConfig
from jaxpipe.models.gpt import GPTConfig
from jaxpipe.runtime.measure.meeting import check_meetings
from jaxpipe.schedule import build

ROWS, LENGTH, MICROBATCHES = 2, 8, 2
SIZES: Any = {"vocab_size": 32, "max_seq_len": LENGTH, "num_layers": 2, "num_heads": 4, "d_model": 16}
LLAMA: Any = {"positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "tied": False}
T5: Any = {
    "vocab_size": 32,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "d_model": 16,
    "d_ff": 24,
}

MODELS = {
    "gpt": lambda **options: gpt_model(GPTConfig(**SIZES, **options, dropout=0.1)),
    "llama": lambda: gpt_model(GPTConfig(**SIZES, **LLAMA)),
    "moe": lambda: gpt_model(GPTConfig(**SIZES, num_experts=4, experts_per_token=2, moe_every=1)),
    "encdec": lambda: encdec_model(EncDecConfig(**T5, head_dim=8)),
    "one key head": lambda: gpt_model(GPTConfig(**SIZES, **LLAMA, num_kv_heads=1, qk_norm=True, qkv_bias=True)),
    "one key head, split": lambda: gpt_model(GPTConfig(**SIZES, **LLAMA, num_kv_heads=1)),
    "two key heads": lambda **options: gpt_model(
        GPTConfig(**SIZES, **LLAMA, **options, num_kv_heads=2, attention="blockwise")
    ),
}
CASES: Any = {
    # model, mesh, sequence cut, schedule, repeats, remat, head
    "gpt": ("gpt", (2, 1, 2, 2), False, "1f1b", 1, "none", "last"),
    "gpt, sequence cut": ("gpt", (2, 1, 1, 2), True, "1f1b", 1, "none", "last"),
    "llama, cut vocabulary": ("llama", (2, 1, 2, 2), False, "1f1b", 1, "full", "vocab_parallel"),
    "moe": ("moe", (2, 1, 1, 2), False, "1f1b", 1, "full", "last"),
    "encdec": ("encdec", (2, 1, 1, 2), False, "1f1b", 1, "full", "last"),
    "one key head": ("one key head", (2, 1, 1, 2), False, "1f1b", 1, "none", "last"),
    "one key head, split": ("one key head, split", (2, 1, 1, 2), False, "zb_h1", 1, "full", "last"),
    "two key heads, sequence cut": ("two key heads", (2, 1, 1, 4), True, "zb_h1", 1, "none", "last"),
}


def batch_of(rows: int, model: jp.Model) -> dict[str, np.ndarray]:
    """Random tokens, for all that the model needs."""
    needed = [name for name, is_needed in model.batch.items() if is_needed]
    tokens = np.random.default_rng(rows).integers(0, 32, (len(needed), rows, LENGTH), dtype=np.int32)
    return dict(zip(needed, tokens, strict=True))


@pytest.fixture(scope="module", params=CASES)
def step(request):
    """A compiled step, its arguments, and the case."""
    name, mesh, cut, schedule, repeats, remat, head = CASES[request.param]
    pipe = jp.Pipeline(
        MODELS[name](sequence_parallel=True) if cut else MODELS[name](),
        schedule=build(schedule, devices=mesh[0], microbatches=MICROBATCHES, repeats=repeats),
        mesh=jp.make_mesh(*mesh),
        remat=remat,
        head=head,
    )
    batch = batch_of(ROWS * MICROBATCHES * mesh[2], pipe.model)
    params = pipe.init(jax.random.key(0), batch)
    args = params, jax.device_put(batch, pipe.batch_sharding), jax.random.key(1)
    return request.param, pipe, jax.jit(pipe.value_and_grad, compiler_options=QUICK).lower(*args).compile(), args


def test_loss_and_gradients_equal_those_of_one_device(step):
    _, pipe, compiled, (params, batch, key) = step
    loss, grads = compiled(params, batch, key)
    oracle = jp.sequential(pipe.model, row_groups=MICROBATCHES * pipe.mesh.shape["fsdp"])
    canonical, host = jax.device_get((pipe.to_canonical(params), batch))
    expected, expected_grads = jax.jit(oracle.value_and_grad, compiler_options=QUICK)(canonical, host, key)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    tree_allclose(pipe.to_canonical(grads), expected_grads)


def test_the_loop_holds_megatrons_collectives(step):
    name, _, compiled, _ = step
    if not name.startswith("gpt"):
        return  # counted for one dense block per stage
    found, gathered = Counter(), set()
    width = f"[{ROWS},{LENGTH},{SIZES['d_model']}]"
    for line in max(loop_bodies(hlo_text(compiled), inner=True), key=len):
        operation = re.search(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)\(", line)
        if not operation:
            continue
        types = line.partition(operation[0])[0]
        gathered |= set(re.findall(r"\[[\d,]*\]", types)) if operation[1] == "all-gather" else set()
        # Work of the model's two ends is marked by what it does; blocks have products only.
        where = re.search(r'op_name="([^"]*)"', line)
        at_end = where and re.search(r"take|vd|reduce|scatter-add", where[1])
        if operation[1] in ("collective-permute", "all-to-all"):
            found[operation[1]] += 1
        elif not at_end:
            found[operation[1]] += types.count(width)  # XLA combines some
    assert found["collective-permute"] == 2 and not found["all-to-all"] and not found["reduce-scatter"]
    if "cut" not in name:
        assert found["all-reduce"] == 4 and not gathered  # two forward, two backward
    else:  # each becomes a gather before and a scattered sum after, which CPUs do by a sum; no weight is gathered
        assert gathered == {width} and found["all-gather"] == 2 + 2 + 2 + 2  # again for weights; head, embedding
        assert found["all-reduce"] == 4


def test_key_heads_that_tensor_does_not_divide_are_gathered(step):
    name, pipe, compiled, _ = step
    if "key head" not in name:
        return
    heads = 4 + 2 * (1 if "one" in name else 2)
    text = hlo_text(compiled)
    check_meetings(text)
    lines = max(loop_bodies(text, inner=True), key=len)
    assert sum(" collective-permute(" in line for line in lines) == 2
    assert not any(" all-to-all(" in line for line in lines)
    gathers = [line for line in lines if " all-gather(" in line and f"[{ROWS},{LENGTH},{4 * heads}]" in line]
    forwards = [line for line in gathers if "/forward/" in line]
    # Once forwards and again for the gradients. Where the backward is split, that of weights gathers nothing.
    assert len(forwards) == 1 and len(gathers) == 2
    assert not [line for line in lines if " all-gather(" in line and "/weight_gradient/" in line]
    columns = 4 * heads // pipe.mesh.shape["tensor"]
    assert any(re.search(rf"= f32\[16,{columns}\]|= f32\[{columns},16\]", line) for line in lines)  # no weight is whole
    assert not any(re.search(rf"= f32\[(16,{4 * heads}|{4 * heads},16)\]", line) for line in lines)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_heads": 4}, "num_heads=4 must be divisible by mesh.tensor=8; try mesh.tensor=4"),
        ({"d_ff": 12}, "num_heads=4 must be divisible by mesh.tensor=8; try mesh.tensor=4"),
        ({"num_heads": 8, "d_ff": 12}, "d_ff=12 must be divisible by mesh.tensor=8; try mesh.tensor=4"),
        (
            {"num_heads": 8, "num_kv_heads": 1},
            "(num_heads+2*num_kv_heads)*head_width=20 must be divisible by mesh.tensor=8; try mesh.tensor=4",
        ),
    ],
)
def test_what_tensor_does_not_divide(sizes, message):
    schedule, mesh = build("1f1b", devices=1, microbatches=2), jp.make_mesh(tensor=8)
    with pytest.raises(ConfigError) as error:
        jp.Pipeline(gpt_model(GPTConfig(**SIZES | sizes)), schedule=schedule, mesh=mesh)
    assert str(error.value) == message
