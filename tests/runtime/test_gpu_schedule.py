"""The training step compiled for H100 GPUs on a machine that has none, and XLA's schedule for it read.

Needs the extra `gpu-aot`. It compiles, it does not run: nothing here is a time. Flags are XLA's defaults.
"""

import re

import h100
import pytest
from hlo import branches_of, holds_product, hops, loop_bodies, products

import jaxpipe as jp
from jaxpipe.runtime.loop.lane import PASSES_IN_PLACE
from jaxpipe.runtime.measure.sizes import tree_bytes
from jaxpipe.schedule.lowering.table import ARRIVAL, Phase, TickTable

pytestmark = h100.MARKS

LOOP = {
    "1f1b": ("1f1b", 1, {"remat": "none"}),
    "1f1b-full": ("1f1b", 1, {"remat": "full"}),
    "interleaved_1f1b": ("interleaved_1f1b", 2, {"remat": "none"}),
    "interleaved_1f1b-full": ("interleaved_1f1b", 2, {"remat": "full"}),
    "zb_h1": ("zb_h1", 1, {"remat": "none", "packing": "paired"}),
    "zb_h1-full": ("zb_h1", 1, {"remat": "full", "packing": "paired"}),
    "zb_h2": ("zb_h2", 1, {"remat": "none", "packing": "paired"}),
    "interleaved_zb": ("interleaved_zb", 2, {"remat": "none", "packing": "paired"}),
    "interleaved_zb-full": ("interleaved_zb", 2, {"remat": "full", "packing": "paired"}),
}
SNAKE = {
    "zb_v": ("zb_v", 2, {"remat": "none", "second_stream": True}),
    "zb_v-full-paired": ("zb_v", 2, {"remat": "full", "packing": "paired", "second_stream": True}),
    "v_half-full": ("v_half", 2, {"remat": "full", "second_stream": True}),
}
MIXED = {
    "uneven": ("1f1b", 1, {"remat": "full", "stages": [3, 2, 2, 1]}),
    "two-kinds": ("interleaved_1f1b", 2, {"remat": "full", "blocks": 1, "kinds": 2}),
}
CASES = {**LOOP, **SNAKE, **MIXED}


@pytest.fixture(scope="module", params=CASES)
def step(request) -> h100.Step:
    """Each case is compiled once, and pytest runs all its tests before the next."""
    name, repeats, options = CASES[request.param]
    return h100.step(name, repeats, **options)


def sides(table: TickTable, lane: str, start: int, stop: int) -> list[str]:
    """The neighbours from which something arrives for a lane in these ticks."""
    columns = {side: table.columns[name][start:stop] for side, name in ARRIVAL[lane].items() if side != "own"}
    return [side for side, rows in columns.items() if max((slot for row in rows for slot in row), default=-1) >= 0]


def num_hops(table: TickTable, phase: Phase) -> int:
    """The directions that a phase uses; what its forward lane sends arrives one tick later."""
    forward = sides(table, "f", phase.start + 1, phase.stop + 1) if phase.forward else []
    return len(forward) + (len(sides(table, "b", phase.start, phase.stop)) if phase.backward else 0)


def test_every_hop_of_the_steady_phase_flies_behind_matrix_products(step):
    for hop in h100.steady_hops(step):
        assert hop.asynchronous
        assert any(holds_product(line, step.parts) for line in hop.behind)


def test_the_head_multiplies_in_bfloat16(step):
    """Logits and both of their gradients: float32 only adds up."""
    found = products(step.text, "/head/")
    assert len(found) >= 3
    assert all(operand.startswith("bf16[") for operands in found for operand in operands)


def test_each_phase_hops_only_where_it_has_something_to_send(step):
    table = step.pipe.table
    wanted = [num_hops(table, phase) for phase in table.phases]
    assert sorted(len(hops(body)) for body in loop_bodies(step.text)) == sorted(n for n in wanted if n)
    assert max(wanted) == (4 if step.pipe.schedule.placement == "v" else 2)


def test_no_stash_accumulator_or_weight_is_copied_in_a_loop(step):
    gathers_once = len(set(step.pipe.layout.kinds)) == 1  # encoder and decoder both take from one table
    assert not h100.copied_in_loops(step, fresh=gathers_once)


def stops(lines: list[str]) -> int:
    """How often a device waits for the host in one turn: for conditionals, and loops of unknown length."""
    asked = (line for line in lines if re.search(r" (conditional|while)\(", line))
    return sum('"known_trip_count"' not in line for line in asked)


def lanes_of(pipe: jp.Pipeline, phase: Phase) -> int:
    """Conditionals and loops of one tick of a phase; embedding and head have their own where they are not inside."""
    lanes = phase.forward + phase.backward + phase.weight
    return lanes if PASSES_IN_PLACE else lanes + phase.forward + phase.head + phase.backward


def test_a_tick_waits_for_the_host_once_per_lane(step):
    phases = step.pipe.table.phases
    wanted = [lanes_of(step.pipe, phase) for phase in phases if phase.stop - phase.start > 1]  # one tick is no loop
    found = [stops(body) for body in loop_bodies(step.text, hopping=False)]
    assert sorted(n for n in found if n) == sorted(wanted)
    split = "I" in step.pipe.schedule.phases
    assert max(wanted) == (3 if split else 2) if PASSES_IN_PLACE else max(wanted) <= 6


def test_no_collective_but_hops_runs_in_a_loop(step):
    names = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
    for body in loop_bodies(step.text, inner=True, hopping=False):
        assert not [line for line in body if any(f" {name}" in line for name in names)]


def test_idle_branches_hold_no_matrix_product(step):
    def works(name: str) -> bool:
        return any(holds_product(line, step.parts) for line in step.parts[name])

    lanes = 0
    bodies = loop_bodies(step.text, hopping=False)
    for branches in (branches_of(line) for body in bodies for line in body if " conditional(" in line):
        working = sum(map(works, branches))
        lanes += working > 0
        assert working in (0, len(branches) - 1)
    assert lanes >= 4  # forward and backward lane, each in two phases


def test_masked_lanes_need_no_conditional():
    step = h100.step("1f1b", remat="none", idle="mask")
    bodies = loop_bodies(step.text, inner=True)
    assert len(bodies) == 3
    assert not [line for body in bodies for line in body if " conditional(" in line]


def test_an_offloaded_stash_is_in_the_memory_of_the_host(monkeypatch):
    monkeypatch.setattr("jaxpipe.runtime.pipeline.skip_of", lambda *_: "deferred")  # as with it, so without it
    here, away = (h100.step("1f1b", remat="none", offload=offload) for offload in (False, True))
    slots, stages = here.pipe.table.slots, here.program.stages
    stash = slots.residual * tree_bytes(stages.residuals.shapes) + slots.activation * tree_bytes(stages.stage.carry)
    assert away.memory.temp_size_in_bytes <= here.memory.temp_size_in_bytes - 0.8 * stash
    assert away.memory.host_temp_size_in_bytes >= stash > 0 == here.memory.host_temp_size_in_bytes


def test_a_cut_vocabulary_reduces_in_the_loop_and_hops_still_fly():
    step = h100.step("interleaved_1f1b", 2, remat="full", head="vocab_parallel")
    found = [hop for body in loop_bodies(step.text) if len(each := hops(body)) == 2 for hop in each]
    assert found and all(hop.asynchronous for hop in found)
    lines = [line for body in loop_bodies(step.text, inner=True, hopping=False) for line in body]
    assert any(" all-reduce" in line for line in lines)
    assert not any(f" {name}" in line for line in lines for name in ("all-gather", "reduce-scatter", "all-to-all"))


def test_the_check_sees_a_hop_that_waits():
    """The same reading finds nothing behind a hop whose result is used at once."""
    line = "%collective-permute-start.1 = (f32[2], f32[2]) collective-permute-start(%p), channel_id=1"
    done = "%d = f32[2] collective-permute-done(%collective-permute-start.1)"
    assert hops([line, done]) == [type(hops([line, done])[0])(True, ())]
    assert hops(["%p = f32[2] collective-permute(%x)"])[0].asynchronous is False
