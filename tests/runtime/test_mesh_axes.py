"""Pipe, data, fsdp and tensor on one mesh: the numbers of the unpipelined model, and what moves and rests where."""

import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import QUICK, ROWS, TOLERANCE, toy_batch, toy_oracle, toy_pipeline, tree_allclose
from hlo import hlo_text, loop_bodies
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxpipe.runtime.measure.sizes import memory_of

CASES: Any = {
    # pipe, data, fsdp, tensor: schedule, repeats, microbatches, remat, dropout, tied, shard
    (2, 2, 2, 1): ("1f1b", 1, 4, "full", 0.25, True, "params"),
    (2, 1, 2, 2): ("1f1b", 1, 3, "none", 0.25, False, "optimizer"),
    (4, 1, 2, 1): ("interleaved_1f1b", 2, 4, "all", 0.0, True, "optimizer"),
    (1, 2, 2, 2): ("gpipe", 1, 2, "full", 0.0, False, "params"),
    (2, 2, 1, 2): ("zb_h1", 1, 4, "none", 0.25, True, "params"),
    (2, 1, 4, 1): ("zb_v", 2, 4, "full", 0.25, False, "params"),
    (1, 1, 4, 2): ("1f1b", 1, 1, "none", 0.0, True, "params"),
    (2, 1, 2, 1): ("breadth_first", 4, 3, "full", 0.25, True, "params"),
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")


def collectives(lines) -> Counter:
    """How many of each kind; those that XLA combined count by their operands."""
    found = Counter()
    for line in lines:
        if name := next((name for name in COLLECTIVES if re.search(rf" {name}(-start)?\(", line)), None):
            operands = re.search(rf" {name}(?:-start)?\(([^)]*)\)", line)
            found[name] += operands[1].count("%") if operands else 0
    return found


@pytest.fixture(scope="module", params=CASES, ids=lambda mesh: "x".join(map(str, mesh)))
def step(request):
    """A compiled step and what it is compared with."""
    pipe_size, data, fsdp, tensor = request.param
    name, repeats, microbatches, remat, dropout, tied, shard = CASES[request.param]
    pipe = toy_pipeline(
        name,
        pipe_size,
        microbatches,
        repeats,
        data=data,
        fsdp=fsdp,
        tensor=tensor,
        shard=shard,
        remat=remat,
        dropout=dropout,
        tied=tied,
    )
    groups = microbatches * data * fsdp
    oracle = toy_oracle(pipe_size * repeats, groups, dropout, tied, "float32")
    params, batch = pipe.from_canonical(oracle[0]), jax.device_put(toy_batch(ROWS * groups), pipe.batch_sharding)
    key = jax.random.key(1) if dropout else None
    compiled = jax.jit(pipe.value_and_grad, compiler_options=QUICK).lower(params, batch, key).compile()
    return pipe, oracle, compiled, (params, batch, key)


def test_loss_and_gradients_equal_the_oracle(step):
    pipe, (_, loss, grads), compiled, args = step
    got, got_grads = compiled(*args)
    assert abs(float(got) - float(loss)) <= TOLERANCE["float32"] * abs(float(loss))
    tree_allclose(pipe.to_canonical(got_grads), grads)


def test_weights_are_gathered_and_gradients_reduced_once_outside_the_loop(step):
    pipe, _, compiled, (params, *_) = step
    mesh, text = pipe.mesh.shape, hlo_text(compiled)
    in_loops = collectives(line for body in loop_bodies(text, inner=True, hopping=False) for line in body)
    assert in_loops["all-gather"] == in_loops["reduce-scatter"] == in_loops["all-to-all"] == 0
    assert mesh["tensor"] > 1 or in_loops["all-reduce"] == 0
    rests = pipe.layout.rests(params)
    ends, everything = jax.tree.leaves((rests["embed"], rests["head"])), jax.tree.leaves(rests)
    over_pipe = sum(rest.pipe is not None for rest in ends)
    over_fsdp = sum(rest.fsdp is not None for rest in everything)
    found = collectives(text.splitlines())
    assert found["reduce-scatter"] == over_pipe + over_fsdp
    assert found["all-gather"] == over_pipe + (over_fsdp if pipe.layout.shard == "params" else 0)
    if mesh["tensor"] == mesh["data"] == 1:  # [1]
        whole = sum(rest.fsdp is None for rest in everything) + sum(rest.pipe is None for rest in ends)
        assert found["all-reduce"] <= whole + 2


# [1] Sums of what is whole over an axis, of the loss and of its weight.


def test_weights_rest_cut_over_every_axis_and_gradients_like_them(step):
    pipe, _, compiled, (params, *_) = step
    mesh, grads = pipe.mesh.shape, compiled.output_shardings[1]
    fsdp, tensor = ("fsdp" if mesh["fsdp"] > 1 else None), ("tensor" if mesh["tensor"] > 1 else None)
    wanted = {"up": P("pipe", fsdp, tensor), "down": P("pipe", tensor, None if tensor is None else fsdp)}
    if tensor is None:
        wanted["down"] = P("pipe", fsdp)
    for name, spec in wanted.items():
        leaf = params["blocks"][0][0][name]
        assert grads["blocks"][0][0][name].is_equivalent_to(NamedSharding(pipe.mesh, spec), leaf.ndim)
        resting = spec if pipe.layout.shard == "params" else P(*(None if axis == "fsdp" else axis for axis in spec))
        assert leaf.sharding.is_equivalent_to(NamedSharding(pipe.mesh, resting), leaf.ndim)


def losses(pipe, steps: int, rows: int) -> np.ndarray:
    """The loss of each step of a run with dropout, clipping and AdamW."""
    batch = jax.device_put(toy_batch(rows), pipe.batch_sharding)
    tx = pipe.optimizer(optax.chain(optax.clip_by_global_norm(0.3), optax.adamw(3e-2, weight_decay=0.1)))
    params = pipe.init(jax.random.key(0), batch)
    state = tx.init(params)

    @jax.jit
    def step(params, state, number):
        loss, grads = pipe.value_and_grad(params, batch, jax.random.fold_in(jax.random.key(5), number))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    found = []
    for number in range(steps):
        params, state, loss = step(params, state, number)
        found.append(float(loss))
    return np.array(found)


def test_a_run_does_not_depend_on_the_mesh():
    meshes = [
        {"devices": 2, "microbatches": 2, "data": 2, "fsdp": 2},
        {"devices": 2, "microbatches": 4, "fsdp": 2, "tensor": 2, "shard": "optimizer"},
        {"devices": 1, "microbatches": 8},
    ]
    runs = [
        losses(toy_pipeline("1f1b", blocks=2 // m["devices"], dropout=0.25, tied=True, **m), 20, 16) for m in meshes
    ]
    for run in runs[1:]:
        np.testing.assert_allclose(run, runs[0], rtol=2e-5)
    assert runs[0][-1] < 0.8 * runs[0][0]


@pytest.mark.parametrize("shard", ["params", "optimizer"])
def test_resting_bytes_fall_with_fsdp_as_arithmetic_says(shard):
    def argument_bytes(shapes, shardings) -> int:
        """Bytes per device of what a program takes."""
        placed = jax.tree.map(lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), shapes, shardings)
        takes = jax.jit(lambda tree: jnp.zeros(()), keep_unused=True)
        return memory_of(takes.lower(placed).compile()).argument_size_in_bytes

    for fsdp in (1, 2, 4):
        pipe = toy_pipeline("1f1b", 2, 2, blocks=2, fsdp=fsdp, shard=shard, tied=True)
        params = jax.eval_shape(pipe.init, jax.random.key(0), toy_batch(4 * fsdp))
        init = jax.jit(pipe.optimizer(optax.scale_by_adam()).init)
        moments = init.lower(params).compile().output_shardings
        block, ends = 8 * 16 + 16 * 8 + 8, 12 * 8  # up, down, scale; table
        bias = 12 // fsdp if fsdp < 4 else 12  # [12], which pipe * fsdp = 8 does not divide
        cut = 4 * ((2 * 2 * block + ends) // fsdp + bias) // 2
        whole = 4 * (2 * 2 * block + ends + 12) // 2
        assert argument_bytes(params, pipe.layout.shardings(params)) == (cut if shard == "params" else whole)
        assert argument_bytes(jax.eval_shape(init, params), moments) == 2 * cut + 4  # two moments and a counter
