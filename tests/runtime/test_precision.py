"""Half precision: what hops, what adds up, what comes out, and how far it is from float32."""

import re
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe as jp
from jaxpipe.jax_internals import scan_counts
from jaxpipe.models.build import gpt_model
from jaxpipe.models.gpt import GPTConfig
from jaxpipe.schedule import build

VOCAB, LENGTH, WIDTH, ROWS, MICROBATCHES = 24, 6, 10, 2, 4
QUICK = {"xla_backend_optimization_level": 0}
BFLOAT16 = GPTConfig(
    vocab_size=VOCAB, max_seq_len=LENGTH, num_layers=2, num_heads=2, d_model=WIDTH, d_ff=14, dtype="bfloat16"
)


def batch(weight: float = 1.0) -> dict[str, np.ndarray]:
    """Random tokens, all of one weight."""
    tokens, targets = np.random.default_rng(0).integers(0, VOCAB, (2, ROWS * MICROBATCHES, LENGTH), dtype=np.int32)
    return {"tokens": tokens, "targets": targets, "mask": np.full(tokens.shape, weight, np.float32)}


def pipeline(cfg: GPTConfig, head: Any = "last", chunk: int | None = None) -> jp.Pipeline:
    """A GPT on two devices, its logits computed for so many tokens at once."""
    schedule, model = build("1f1b", devices=2, microbatches=MICROBATCHES), gpt_model(cfg)
    model = replace(model, head_loss=replace(model.head_loss, chunk=chunk))
    return jp.Pipeline(model, schedule=schedule, mesh=jp.make_mesh(2), remat="none", head=head)


@cache
def oracle(dtype: Any) -> tuple[Any, Any, Any]:
    """``(canonical, loss, grads)`` of the unpipelined GPT."""
    model = jp.sequential(gpt_model(replace(BFLOAT16, dtype=dtype)), row_groups=MICROBATCHES)
    canonical = model.init(jax.random.key(0), batch())
    return canonical, *jax.jit(model.value_and_grad, compiler_options=QUICK)(canonical, batch())


@cache
def bfloat16_step():
    """The pipeline, its step lowered, and the step compiled."""
    pipe = pipeline(BFLOAT16)
    params = pipe.from_canonical(oracle("bfloat16")[0])
    lowered = jax.jit(pipe.value_and_grad).lower(params, batch())
    return pipe, params, lowered, lowered.compile()


def relative_errors(actual: Any, expected: Any) -> list[float]:
    """The largest error of each leaf over its largest entry."""
    return [
        float(jnp.abs(a - b).max() / jnp.abs(b).max())
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    ]


def test_what_hops_is_bfloat16():
    """In the program that XLA is given: for CPUs, which cannot send bfloat16, it widens hops itself."""
    _, _, lowered, _ = bfloat16_step()
    sent = re.findall(r"collective_permute.*-> tensor<([^>]*)>", lowered.as_text())
    assert len(sent) >= 3
    assert set(sent) == {f"{ROWS}x{LENGTH}x{WIDTH}xbf16"}


def loop_carries(jaxpr: Any) -> list[Any]:
    """What the scans of a program carry from turn to turn."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            first, carried = scan_counts(eqn)
            found += [v.aval for v in eqn.invars[first : first + carried]]
        elif inner := eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr"):
            found += loop_carries(getattr(inner, "jaxpr", inner))
    return found


def test_gradients_add_up_in_float32():
    """Of what the ticks carry, whatever has the shape of a matrix is float32, though the lanes use it in bfloat16."""
    pipe, params, _, _ = bfloat16_step()
    traced = jax.make_jaxpr(pipe.value_and_grad)(params, batch())
    carried = {(aval.shape, aval.dtype) for aval in loop_carries(traced.jaxpr)}
    lanes_use = [leaf for leaf in jax.tree.leaves(pipe.program(params, batch()).stages.weights) if leaf.ndim == 2]
    assert len(lanes_use) == 4
    for leaf in lanes_use:
        assert leaf.dtype == jnp.bfloat16
        assert {dtype for shape, dtype in carried if shape == leaf.shape} == {jnp.dtype(jnp.float32)}


def products(jaxpr: Any) -> list[tuple[set, set]]:
    """The operands' dtypes, and the dims of operands and result, of all products of a program."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            avals = [v.aval for v in (*eqn.invars, *eqn.outvars)]
            found.append(({a.dtype for a in avals[:2]}, {size for a in avals for size in a.shape}))
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                    found += products(inner)
    return found


def test_the_head_multiplies_in_bfloat16():
    """Logits and both of their gradients, in the pipeline and in the oracle."""
    pipe, params, _, _ = bfloat16_step()
    model = jp.sequential(gpt_model(BFLOAT16), row_groups=MICROBATCHES)
    for step, given in ((pipe.value_and_grad, params), (model.value_and_grad, oracle("bfloat16")[0])):
        found = products(jax.make_jaxpr(step)(given, batch()).jaxpr)
        heads = [dtypes for dtypes, dims in found if VOCAB in dims]
        assert len(heads) >= 3 and heads == [{jnp.dtype(jnp.bfloat16)}] * len(heads)


def test_loss_and_gradients_are_float32_and_close_to_the_oracle():
    pipe, params, _, compiled = bfloat16_step()
    _, loss, grads = oracle("bfloat16")
    got, got_grads = compiled(params, batch())
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, loss, rtol=1e-3)
    got_grads = pipe.to_canonical(got_grads)
    assert {leaf.dtype for leaf in jax.tree.leaves(got_grads)} == {jnp.dtype(jnp.float32)}
    assert max(relative_errors(got_grads, grads)) <= 2e-2


@pytest.mark.parametrize(("head", "chunk"), [("last", 5), ("vocab_parallel", None), ("vocab_parallel", 4)])
def test_other_heads_are_as_close_to_the_oracle(head, chunk):
    canonical, loss, grads = oracle("bfloat16")
    pipe = pipeline(BFLOAT16, head, chunk)
    got, got_grads = jax.jit(pipe.value_and_grad, compiler_options=QUICK)(pipe.from_canonical(canonical), batch())
    np.testing.assert_allclose(got, loss, rtol=1e-3)
    assert max(relative_errors(pipe.to_canonical(got_grads), grads)) <= 2e-2


def test_float16_needs_the_loss_scale_and_then_equals_float32():
    """Tokens that count little have small gradients: lost without the scale, though the weights cancel in the mean."""
    canonical, _, grads = oracle("float32")
    pipe = pipeline(replace(BFLOAT16, dtype="float16"))
    params = pipe.from_canonical(canonical)
    step = jax.jit(pipe.value_and_grad, compiler_options=QUICK)

    def gradient(loss_scale: float):
        loss, got = step(params, batch(weight=1e-5), loss_scale=loss_scale)
        assert loss.dtype == jnp.float32
        return pipe.to_canonical(got)

    def zeros(tree):
        return np.mean([float((leaf == 0).mean()) for leaf in jax.tree.leaves(tree["blocks"])])

    scaled, plain = gradient(1024.0), gradient(1.0)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(scaled))
    assert max(relative_errors(scaled, grads)) <= 1e-2
    assert max(relative_errors(plain, grads)) > 0.5
    assert zeros(plain) > 0.3
    assert zeros(scaled) < 0.05
