"""Bytes that loops move, on loops whose bytes are known."""

import jax
import jax.numpy as jnp
import pytest
from hlo import hlo_text
from jax import lax

from jaxpipe.runtime.loop.lane import Lane, run_lane
from jaxpipe.runtime.measure.traffic import Traffic, traffic, turns_of_loops

ROWS, ROW = 8, 1000
BUFFER = jax.ShapeDtypeStruct((ROWS, ROW), jnp.float32)


def first(rows):
    """The first row, at an index that XLA knows."""
    return lax.slice(rows, (0, 0), (1, ROW))


def put(buffer, row, at):
    """The buffer with a row written."""
    return lax.dynamic_update_slice(buffer, row, (at, 0))


def moved(body, at_least: int = 1024) -> list[Traffic]:
    """Of a loop of ``body(buffer, rows, at)``, where `rows` is like the buffer."""

    def loop(buffer, rows):
        return lax.scan(lambda b, i: (body(b, rows, i), None), buffer, jnp.arange(ROWS))[0]

    step = jax.jit(loop, donate_argnums=0)
    return traffic(hlo_text(step.lower(BUFFER, BUFFER).compile()), at_least)


def test_an_update_in_place_moves_the_update_only():
    assert moved(lambda b, rows, i: put(b, jnp.cos(first(rows)), i)) == [Traffic(0, 0, 4 * ROW, ROWS)]


def test_what_is_sliced_and_what_is_updated_are_told_apart():
    def body(b, rows, i):
        return put(b, jnp.cos(lax.dynamic_slice(rows, (i, 0), (1, 300))), i)

    assert moved(body) == [Traffic(0, 4 * 300, 4 * 300, ROWS)]


def test_what_is_only_turned_for_a_product_is_told_apart():
    """Here by hand: whether XLA turns an array by itself or within what computes it differs between versions."""
    text = """
%turned (p.1: f32[8,1000]) -> f32[1000,8] {
  %p.1 = f32[8,1000]{1,0} parameter(0)
  %transpose.1 = f32[1000,8]{0,1} transpose(%p.1), dimensions={1,0}
  ROOT %copy.1 = f32[1000,8]{1,0} copy(%transpose.1)
}

%body (p.2: f32[8,1000]) -> f32[8,1000] {
  %p.2 = f32[8,1000]{1,0} parameter(0)
  %fusion.1 = f32[1000,8]{1,0} fusion(%p.2), kind=kLoop, calls=%turned
  ROOT %dot.1 = f32[8,1000]{1,0} dot(%p.2, %fusion.1)
}

ENTRY %main (p.3: f32[8,1000]) -> f32[8,1000] {
  %p.3 = f32[8,1000]{1,0} parameter(0)
  ROOT %while.1 = f32[8,1000]{1,0} while(%p.3), condition=%less, body=%body
}
"""
    (loop,) = traffic(text)
    assert loop == Traffic(transpose_bytes=4 * ROWS * ROW)
    assert loop.total_bytes == 4 * ROWS * ROW


def test_small_arrays_are_left_out():
    assert moved(lambda b, rows, i: put(b, jnp.cos(first(rows)), i), 4 * ROW + 1) == [Traffic(turns=ROWS)]


def test_a_buffer_that_is_read_after_its_update_is_copied():
    def body(b, rows, i):
        new = put(b, first(rows), i)
        return lax.optimization_barrier((new, b))[0] + 0 * lax.optimization_barrier(b)[::-1]

    assert moved(body)[0].copy_bytes >= 4 * ROWS * ROW


def test_a_conditional_counts_with_its_dearest_branch():
    def body(b, rows, i):
        def get():
            return jnp.cos(lax.dynamic_slice(rows, (i, 0), (1, ROW)))

        return put(b, lax.cond(i < 4, get, lambda: jnp.cos(first(rows))), i)

    (loop,) = moved(body)
    assert (loop.slice_bytes, loop.update_bytes) == (4 * ROW, 4 * ROW)


@pytest.mark.parametrize("turns", [3, 5])
def test_an_inner_loop_counts_as_often_as_it_turns(turns):
    def body(b, rows, i):
        return lax.scan(lambda b, j: (put(b, jnp.cos(first(rows)), j), None), b, jnp.arange(turns) + i)[0]

    (loop,) = moved(body)
    assert (loop.update_bytes, loop.turns) == (turns * 4 * ROW, ROWS)


def test_loops_come_in_the_order_of_the_program():
    def loops(x):
        for turns in (3, 5):
            x, _ = lax.scan(lambda b, i: (put(b, jnp.cos(first(b)), i), None), x, jnp.arange(turns))
        return x

    text = hlo_text(jax.jit(loops, donate_argnums=0).lower(BUFFER).compile())
    assert [loop.turns for loop in traffic(text)] == [3, 5]


HAND_MADE = """
HloModule made
%through (p.1: f32[8,1000], p.2: f32[1,1000], p.3: s32[]) -> f32[1,1000] {
  %p.1 = f32[8,1000]{1,0} parameter(0)
  %p.2 = f32[1,1000]{1,0} parameter(1)
  %p.3 = s32[] parameter(2)
  %put = f32[8,1000]{1,0} dynamic-update-slice(%p.1, %p.2, %p.3, %p.3)
  ROOT %get = f32[1,1000]{1,0} dynamic-slice(%put, %p.3, %p.3), dynamic_slice_sizes={1,1000}
}
%whole (p.1: f32[8,1000], p.2: f32[1,1000], p.3: s32[]) -> f32[8,1000] {
  %p.1 = f32[8,1000]{1,0} parameter(0)
  %p.2 = f32[1,1000]{1,0} parameter(1)
  %p.3 = s32[] parameter(2)
  %put = f32[8,1000]{1,0} dynamic-update-slice(%p.1, %p.2, %p.3, %p.3)
  ROOT %more = f32[8,1000]{1,0} add(%put, %put)
}
%body (state: (f32[8,1000], f32[1,1000], s32[])) -> (f32[8,1000], f32[1,1000], s32[]) {
  %state = (f32[8,1000]{1,0}, f32[1,1000]{1,0}, s32[]) parameter(0)
  %buffer = f32[8,1000]{1,0} get-tuple-element(%state), index=0
  %row = f32[1,1000]{1,0} get-tuple-element(%state), index=1
  %at = s32[] get-tuple-element(%state), index=2
  %seen = f32[1,1000]{1,0} fusion(%buffer, %row, %at), kind=kLoop, calls=%through
  %made = f32[8,1000]{1,0} fusion(%buffer, %row, %at), kind=kLoop, calls=%whole
  %copied = (f32[8,1000]{1,0}, f32[8,1000]{1,0}, u32[]) copy-start(%made)
  ROOT %next = (f32[8,1000]{1,0}, f32[1,1000]{1,0}, s32[]) tuple(%made, %seen, %at)
}
ENTRY %main (state: (f32[8,1000], f32[1,1000], s32[])) -> (f32[8,1000], f32[1,1000], s32[]) {
  %state = (f32[8,1000]{1,0}, f32[1,1000]{1,0}, s32[]) parameter(0)
  ROOT %loop = (f32[8,1000]{1,0}, f32[1,1000]{1,0}, s32[]) while(%state), condition=%more, body=%body
}
"""


def test_fusions_that_read_through_an_update_or_write_the_whole_buffer():
    assert traffic(HAND_MADE) == [Traffic(copy_bytes=2 * 32000, slice_bytes=4000, update_bytes=0)]


def test_of_a_lanes_branches_the_dearest_counts_and_lanes_add_up():
    def lane(name: str) -> Lane:
        branches = [lambda rows, n=n: ((), jnp.tile(jnp.cos(rows[:1] + n), (n, 1))) for n in (1, 2, 3)]
        return Lane(name, branches, lambda state, rows: {"b": put(state["b"], rows, 0)}, None, ["b"])

    def body(b, rows, i):
        for name in ("one", "two"):
            with jax.named_scope(name):
                state, _, _ = run_lane("loop", lane(name), {"b": b}, i % 4 - 1, (), rows, lambda shapes: shapes)
            b = state["b"]
        return b

    (loop,) = moved(body)
    assert (loop.copy_bytes, loop.update_bytes) == (0, 2 * 3 * 4 * ROW)


def test_a_turn_is_told_apart_from_its_lanes():
    """A loop whose conditional reads and writes a row, or nothing, and a loop that may not turn."""

    def turn(state, number):
        rows, sums = state
        rows = jax.lax.cond(number > 2, lambda rows: rows.at[0].multiply(2.0), lambda rows: rows, rows)
        sums = jax.lax.while_loop(lambda s: s[0] < number, lambda s: s + jnp.cos(s), sums)
        return (rows, sums + 1), None

    rows, sums = jnp.ones((8, 4096)), jnp.ones(2048)
    compiled = jax.jit(lambda *state: jax.lax.scan(turn, state, jnp.arange(5.0))[0]).lower(rows, sums).compile()
    (found,) = [turn for turn in turns_of_loops(compiled.as_text() or "") if len(turn.lanes) == 2]
    conditional, loop = found.lanes
    assert max(conditional) >= 2 * 4096 * 4 and min(conditional) < 1024
    assert loop[0] == 0 and loop[1] >= 2 * 2048 * 4
    assert found.own >= 2 * 2048 * 4
