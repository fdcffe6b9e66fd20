"""The training step compiled for H100 GPUs on a machine that has none, and XLA's schedule for it read.

Needs the extra `gpu-aot`. It compiles, it does not run: nothing here is a time.
"""

import importlib.util
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import branches_of, computations, copies, hlo_text, holds_product, hops, loop_bodies
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

import jaxpipe as jp
from jaxpipe.models.gpt import GPTConfig
from jaxpipe.runtime.mesh import AXES
from jaxpipe.schedule import build
from jaxpipe.train.model import gpt_model

pytestmark = [
    pytest.mark.gpu_aot,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda12_plugin") is None,
        reason="the extra gpu-aot (jax-cuda12-plugin, nvidia-cuda-nvcc-cu12) is not installed",
    ),
]

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""The public data sheet in XLA's text form."""


@cache
def compiled(repeats: int, remat: str):
    """(pipeline, program, HLO text) of a GPT in bf16 with float32 weights on four H100s, two blocks per stage."""
    topology = topologies.get_topology_desc(platform="cuda", topology_name="h100", topology="1x1x4", target_config=H100)
    mesh = Mesh(np.asarray(topology.devices).reshape(4, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    cfg = GPTConfig(
        vocab_size=384,
        max_seq_len=96,
        num_layers=8 * repeats,
        num_heads=4,
        d_model=256,
        dtype="bfloat16",
        tied=False,
    )
    name = "interleaved_1f1b" if repeats > 1 else "1f1b"
    schedule = build(name, devices=4, microbatches=8, repeats=repeats)
    pipe = jp.Pipeline(gpt_model(cfg), schedule=schedule, mesh=mesh, remat=remat)  # pyright: ignore
    tokens = jax.ShapeDtypeStruct((16, 96), jnp.int32, sharding=pipe.batch_sharding)
    batch = {"tokens": tokens, "targets": tokens}
    params = jax.eval_shape(pipe.init, jax.random.key(0), batch)
    placed = jax.tree.map(
        lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), params, pipe.layout.shardings(params)
    )
    text = hlo_text(jax.jit(pipe.value_and_grad).lower(placed, batch).compile())
    return pipe, pipe.program(placed, batch), text


CASES = [(1, "none"), (2, "none"), (2, "full")]


@pytest.mark.parametrize(("repeats", "remat"), CASES)
def test_every_hop_of_the_steady_phase_flies_behind_matrix_products(repeats, remat):
    _, _, text = compiled(repeats, remat)
    parts = computations(text)
    steady = [found for body in loop_bodies(text) if len(found := hops(body)) == 2]
    assert len(steady) == 1
    for hop in steady[0]:
        assert hop.asynchronous
        assert any(holds_product(line, parts) for line in hop.behind)


@pytest.mark.parametrize(("repeats", "remat"), CASES)
def test_each_phase_hops_only_where_it_has_something_to_send(repeats, remat):
    pipe, _, text = compiled(repeats, remat)
    wanted = sorted(phase.forward + phase.backward for phase in pipe.table.phases)
    assert sorted(len(hops(body)) for body in loop_bodies(text)) == wanted == [1, 1, 2]


@pytest.mark.parametrize(("repeats", "remat"), CASES)
def test_no_stash_accumulator_or_weight_is_copied_in_a_loop(repeats, remat):
    pipe, program, text = compiled(repeats, remat)
    weights = {leaf.shape for leaf in jax.tree.leaves(program.stages.weights) if leaf.ndim > 1}
    ends = {leaf.shape for leaf in jax.tree.leaves(program.ends.shapes) if leaf.ndim > 1}
    slots = pipe.table.slots
    stash = {(slots.residual + 1, *leaf.shape) for leaf in program.stages.residuals.shapes}
    stash |= {(slots.activation + 1, *leaf.shape) for leaf in jax.tree.leaves(program.stages.stage.carry)}
    accumulators = {(repeats, *shape) for shape in weights}
    copied = [shape for body in loop_bodies(text, inner=True) for shape in copies(body)]
    assert not [shape for shape in copied if shape in weights | ends | stash | accumulators]


@pytest.mark.parametrize(("repeats", "remat"), CASES)
def test_no_collective_but_hops_runs_in_a_loop(repeats, remat):
    _, _, text = compiled(repeats, remat)
    names = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
    for body in loop_bodies(text, inner=True):
        assert not [line for line in body if any(f" {name}" in line for name in names)]


@pytest.mark.parametrize(("repeats", "remat"), CASES)
def test_idle_branches_hold_no_matrix_product(repeats, remat):
    _, _, text = compiled(repeats, remat)
    parts = computations(text)

    def works(name: str) -> bool:
        return any(holds_product(line, parts) for line in parts[name])

    lanes = 0
    for branches in (branches_of(line) for body in loop_bodies(text) for line in body if " conditional(" in line):
        working = sum(map(works, branches))
        lanes += working > 0
        assert working in (0, len(branches) - 1)
    assert lanes >= 4  # forward and backward lane, each in two phases


def test_the_check_sees_a_hop_that_waits():
    """The same reading finds nothing behind a hop whose result is used at once."""
    line = "%collective-permute-start.1 = (f32[2], f32[2]) collective-permute-start(%p), channel_id=1"
    done = "%d = f32[2] collective-permute-done(%collective-permute-start.1)"
    assert hops([line, done]) == [type(hops([line, done])[0])(True, ())]
    assert hops(["%p = f32[2] collective-permute(%x)"])[0].asynchronous is False
