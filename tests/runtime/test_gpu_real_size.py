"""Training steps of real size compiled for H100s, from shapes alone (extra `gpu-aot`); nothing runs.

The runs are those of configs/, with fewer microbatches: the program does not grow with them. Each is compiled once,
with optimizer and donated state as `jaxpipe train` compiles it, and all claims are read off it.
"""

import re
from pathlib import Path

import h100
import jax
import jax.numpy as jnp
import pytest
from hlo import holds_product, products

from jaxpipe.measure.planning import resolve
from jaxpipe.plan import find_device
from jaxpipe.runtime.measure.sizes import tree_bytes
from jaxpipe.train import load

pytestmark = h100.MARKS

CONFIG = Path(__file__).parents[2] / "configs" / "llama-7b-8gpu.toml"
SMALLER = ("model.num_layers=24", "model.num_heads=16", "model.d_model=2048", "model.d_ff=5504", "mesh.pipe=4")
"""1.3 B parameters on 4 pipeline devices."""
BYTES_LIMIT = 72e9
"""Of the 80 GB of a card, what JAX is given by ``gpu.memory_fraction``."""


def case(name: str, repeats: int, remat: str, *more: str, rows: int = 16) -> tuple[str, ...]:
    """Overrides of the config: 16 microbatches of one sequence on each part of the batch."""
    schedule = f"schedule.name={name}", f"schedule.repeats={repeats}", f"schedule.remat={remat}"
    return (*schedule, "schedule.microbatches=16", f"train.batch_size={rows}", *more)


CASES: dict[str, tuple[str, ...]] = {
    "1f1b": case("1f1b", 1, "full"),
    "interleaved_1f1b": case("interleaved_1f1b", 2, "full"),
    "zb_h1": case("zb_h1", 1, "full"),
    "zb_v": case("zb_v", 2, "full", "gpu.second_stream=true"),
    "1f1b-none": case("1f1b", 1, "none"),
    "1.3b-data": case("1f1b", 1, "full", *SMALLER, "mesh.data=2", rows=32),
    "1.3b-fsdp": case("1f1b", 1, "full", *SMALLER, "mesh.fsdp=2", rows=32),
    "1.3b-tensor": case("1f1b", 1, "full", *SMALLER, "mesh.tensor=2", "gpu.second_stream=true"),
    "1.3b-all": case(
        "1f1b", 1, "full", *SMALLER, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "gpu.second_stream=true", rows=64
    ),
}


SLOW = ("1.3b-data", "1.3b-fsdp", "1.3b-tensor")
"""One axis at a time; all of them together are looked at always."""


@pytest.fixture(scope="module", params=[pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES])
def step(request) -> h100.TrainStep:
    """Each case is compiled once, and pytest runs all its tests before the next."""
    return h100.train_step(load(CONFIG, CASES[request.param]))


def kernels(text: str, name: str) -> int:
    """How often a program calls a kernel of cuDNN."""
    return text.count(f'custom_call_target="__cudnn${name}"')


def test_attention_is_the_fused_kernel(step):
    """Each block has its forward kernel in every forward lane, and where it is run again in every backward lane."""
    model, length = step.config.model, step.config.train.seq_len
    blocks = model.num_layers // step.pipe.schedule.stages
    forward, backward = (h100.stage_copies(step, lane) for lane in "fb")
    again = backward if step.config.schedule.remat == "full" else 0
    assert kernels(step.text, "fmhaSoftmax") == (forward + again) * blocks
    assert kernels(step.text, "fmhaSoftmaxBackward") == backward * blocks
    heads = model.num_heads // step.config.mesh.tensor
    assert not re.search(rf"\[(1,)?{heads},{length},{length}\]", step.text)


def test_no_product_has_two_float32_operands(step):
    found = products(step.text)
    assert len(found) > 20 * step.config.model.num_layers // step.config.mesh.pipe
    assert not [operands for operands in found if all(operand.startswith("f32[") for operand in operands)]


def batch_of(step: h100.TrainStep) -> dict:
    """Shapes of a batch."""
    train = step.config.train
    return dict.fromkeys(("tokens", "targets"), jax.ShapeDtypeStruct((train.batch_size, train.seq_len), jnp.int32))


def test_the_state_is_changed_in_place(step):
    memory, batch = step.memory, batch_of(step)
    for held in (memory.argument_size_in_bytes, memory.output_size_in_bytes):
        assert 0 <= held - memory.alias_size_in_bytes <= tree_bytes(batch) + 4096
    parameters = tree_bytes(jax.eval_shape(step.pipe.init, jax.random.key(0), batch))
    mesh = step.config.mesh
    state = 3 * parameters / (mesh.pipe * mesh.fsdp * mesh.tensor)  # with two moments
    assert memory.alias_size_in_bytes == pytest.approx(state, rel=1e-3)


def test_hops_of_the_steady_phase_fly_behind_matrix_products(step):
    for hop in h100.steady_hops(step):
        assert hop.asynchronous
        assert any(holds_product(line, step.parts) for line in hop.behind)


def test_no_stash_sum_or_weight_is_copied_in_a_loop(step):
    if step.config.mesh.tensor > 1:
        pytest.skip("shapes are those of the whole mesh axis")
    assert not h100.copied_in_loops(step)


def test_the_peak_is_what_the_planner_says_and_fits(step):
    plan = resolve(step.config, find_device("h100")).plan
    assert plan is not None
    assert plan.memory.total == pytest.approx(step.peak_bytes, rel=0.1)
    assert step.peak_bytes < BYTES_LIMIT


def test_sizes_say_the_temporaries(step):
    """Pieces compiled one by one for the mesh's own devices add up to what the whole step takes."""
    planned = sum(step.pipe.table.bytes(step.pipe.sizes(batch_of(step))).values())
    assert planned == pytest.approx(step.memory.temp_size_in_bytes, rel=0.1)
