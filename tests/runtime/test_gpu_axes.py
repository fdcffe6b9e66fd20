"""Pipe, data or fsdp, and tensor together, compiled for 16 H100s on two nodes (extra `gpu-aot`); nothing runs."""

import math
import re
from typing import Any

import h100
import jax
import jax.numpy as jnp
import pytest
from hlo import hops, loop_bodies

pytestmark = h100.MARKS

CASES: Any = {
    "data": ("1f1b", 1, {"remat": "none", "axes": {"data": 2, "tensor": 2}}),
    "fsdp": ("interleaved_1f1b", 2, {"remat": "full", "axes": {"fsdp": 2, "tensor": 2}, "blocks": 1}),
}


@pytest.fixture(scope="module", params=CASES)
def step(request) -> h100.Step:
    """With hops on a stream of their own."""
    name, repeats, options = CASES[request.param]
    return h100.step(name, repeats, second_stream=True, **options)


def lines_of(lines: list[str], operation: str) -> list[str]:
    """The instructions that are this collective, started or at once."""
    return [line for line in lines if re.search(rf" {operation}(-start)?\(", line)]


def in_loops(step: h100.Step) -> list[str]:
    """The instructions of all loops and of the lanes in them, each once."""
    bodies = loop_bodies(step.text, inner=True, hopping=False)
    return list(dict.fromkeys(line for body in bodies for line in body))


def test_nothing_but_hops_and_sums_over_tensor_is_in_the_loop(step):
    lines = in_loops(step)
    for operation in ("all-gather", "reduce-scatter", "all-to-all"):
        assert not lines_of(lines, operation)
    for line in lines_of(lines, "all-reduce"):
        groups = r"replica_groups=(\[8,2\]<=\[16\]|\{\{0,1\},\{2,3\}|mesh\[[^]]*\] \{'tensor'\})"
        assert re.search(groups, line), line[:300]


def num_results(line: str) -> int:
    """The elements that a collective gives."""
    types = re.split(r" (?:all-reduce|reduce-scatter)(?:-start)?\(", line.partition("=")[2])[0].strip()
    types = types.partition("), ")[2] if types.startswith("((") else types  # of a start the operands come first
    return sum(math.prod(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\[([\d,]*)\]", types))


def test_gradients_are_reduced_once_after_the_loop(step):
    pipe, loops = step.pipe, set(in_loops(step))
    outside = [line for lines in step.parts.values() for line in lines if line not in loops]
    found = [line for name in ("all-reduce", "reduce-scatter") for line in lines_of(outside, name)]
    over_batch = [
        line
        for line in found
        if re.search(
            r"replica_groups=(\{\{0,2\},\{1,3\}|\[8,2\]<=\[4,2,2\]T\(0,2,1\)|mesh\[[^]]*\] \{'(data|fsdp)'\})", line
        )
    ]
    tokens = jax.ShapeDtypeStruct((2 * h100.MICROBATCHES * 2, h100.LENGTH), jnp.int32)
    params = jax.eval_shape(pipe.init, jax.random.key(0), {"tokens": tokens, "targets": tokens})
    local = jax.tree.map(lambda s, h: math.prod(h.shard_shape(s.shape)), params, pipe.layout.shardings(params))
    assert sum(map(num_results, over_batch)) == sum(jax.tree.leaves(local))
    if pipe.mesh.shape["data"] > 1:
        assert len(over_batch) == 1  # all leaves in one


def test_every_hop_of_the_steady_phase_is_asynchronous(step):
    steady = [found for body in loop_bodies(step.text) if len(found := hops(body)) == 2]
    assert steady
    assert all(hop.asynchronous and hop.behind for found in steady for hop in found)


def test_breadth_first_gathers_one_repeat_behind_the_loop_of_another():
    two = {"xla_gpu_experimental_parallel_collective_overlap_limit": 2}
    step = h100.step("breadth_first", 4, blocks=1, axes={"fsdp": 2}, compiler=two)
    entry = next(lines for lines in step.parts.values() if sum(" while(" in line for line in lines) > 2)
    found = re.findall(r" (all-gather-start|all-gather-done|while)\(", "\n".join(entry))
    first, last = found.index("while"), len(found) - found[::-1].index("while")
    between = " ".join(found[first:last])
    assert between.count("all-gather-start") >= 2
    assert "all-gather-start while all-gather-done" in between
    everything = h100.step("breadth_first", 4, blocks=1, axes={"fsdp": 2}, shard="optimizer")
    assert step.memory.temp_size_in_bytes < everything.memory.temp_size_in_bytes
