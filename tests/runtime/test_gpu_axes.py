"""Pipe, data or fsdp, and tensor together, compiled for 16 H100s on two nodes (extra `gpu-aot`); nothing runs."""

import re

import h100
import pytest
from hlo import hops, loop_bodies

pytestmark = h100.MARKS

CASES = {
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
        assert re.search(r"replica_groups=(\[8,2\]<=\[16\]|\{\{0,1\},\{2,3\})", line), line[:300]


def test_gradients_are_reduced_once_after_the_loop(step):
    loops = set(in_loops(step))
    outside = [line for lines in step.parts.values() for line in lines if line not in loops]
    tensor_only = re.compile(r"replica_groups=(\[8,2\]<=\[16\]|\{\{0,1\},\{2,3\})")
    sums = [line for line in lines_of(outside, "all-reduce") if not tensor_only.search(line)]
    scattered = lines_of(outside, "reduce-scatter")
    mesh = step.pipe.mesh.shape
    leaves = sum(
        re.search(r" (?:all-reduce|reduce-scatter)(?:-start)?\(([^)]*)\)", line)[1].count("%")  # pyright: ignore
        for line in [*sums, *scattered]
    )
    weights = len(h100.jax.tree.leaves(step.program.stages.weights))
    ends = len(h100.jax.tree.leaves(step.program.ends.shapes))
    # Each leaf once over data or fsdp, those of embedding and head once over the pipe besides; loss and weight.
    assert weights + ends <= leaves <= weights + 2 * ends + 4
    assert (len(scattered) > 0) == (mesh["fsdp"] > 1 or mesh["pipe"] > 1)


def test_every_hop_of_the_steady_phase_is_asynchronous(step):
    steady = [found for body in loop_bodies(step.text) if len(found := hops(body)) == 2]
    assert steady
    assert all(hop.asynchronous and hop.behind for found in steady for hop in found)
