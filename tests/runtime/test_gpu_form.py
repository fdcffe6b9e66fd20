"""The loop as GPUs run it, lanes in conditionals and hops in flight, on simulated devices: the numbers are right.

What it becomes on a GPU is read off compiled programs (test_gpu_schedule.py); that it computes the right thing is seen
here.
"""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from helpers import QUICK, pairwise, toy_batch, toy_oracle, toy_pipeline, tree_allclose

import jaxpipe as jp
from jaxpipe.errors import ScheduleError
from jaxpipe.models.build import gpt_model
from jaxpipe.models.gpt import GPTConfig
from jaxpipe.runtime.loop.compile import Program
from jaxpipe.schedule import build

FORMS: dict[str, dict[str, Any]] = {
    "inside": {"skip": "branch", "ends_inside": True},  # jaxlib 0.11.1 and newer
    "branch": {"skip": "branch"},  # older, stages alike
    "deferred": {"skip": "deferred"},  # older, several branches
}
FACTORS = {
    "form": list(FORMS),
    "schedule": ["1f1b", "interleaved_1f1b", "breadth_first", "zb_h1", "interleaved_zb", "zb_v", "dualpipe_v"],
    "devices": [1, 2, 4],
    "remat": ["full", "none"],
    "dropout": [0.0, 0.25],
    "tied": [False, True],
}


def schedule_of(case: dict) -> Any:
    """The schedule of a case, None where there is none of that size."""
    one = case["schedule"] in ("1f1b", "zb_h1")
    try:
        return build(case["schedule"], devices=case["devices"], microbatches=8, repeats=1 if one else 2)
    except ScheduleError:
        return None


CASES = list(pairwise(FACTORS, schedule_of))


def outcome(pipe: jp.Pipeline, form: dict, params: Any, batch: Any, key: Any = None, **options: Any) -> Any:
    """What a program of a pipeline gives in a form."""
    program = replace(pipe.program(params, batch, random=key is not None, **options), hops_block=False, **form)
    return jax.jit(lambda *args: Program.__call__(program, *args), compiler_options=QUICK)(params, batch, key)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_loss_and_gradients_equal_the_oracle(case):
    schedule = schedule_of(case)
    dropout, tied = case["dropout"], case["tied"]
    pipe = toy_pipeline(
        case["schedule"], schedule.devices, 8, schedule.repeats, remat=case["remat"], dropout=dropout, tied=tied
    )
    canonical, loss, grads = toy_oracle(schedule.stages, 8, dropout, tied, "float32")
    key = jax.random.key(1) if dropout else None
    out = outcome(pipe, FORMS[case["form"]], pipe.from_canonical(canonical), toy_batch(16), key)
    np.testing.assert_allclose(out.loss / out.weight, loss, rtol=1e-5)
    tree_allclose(pipe.to_canonical(jax.tree.map(lambda g: g / out.weight, out.gradient)), grads)


MODELS: dict[str, tuple[Any, Any]] = {
    "uneven": ({"num_layers": 5}, {"stages": [2, 1, 2]}),
    "experts": ({"num_layers": 3, "num_experts": 2, "moe_every": 2}, {}),
    "cut vocabulary": ({"num_layers": 3, "tied": True}, {"head": "vocab_parallel"}),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("form", FORMS)
def test_stages_that_differ_equal_what_loops_give(form, model):
    """Loss, aux, metrics and gradients of stages of several kinds, against the same program in loops."""
    sizes, options = MODELS[model]
    cfg = GPTConfig(vocab_size=12, max_seq_len=5, num_heads=2, d_model=8, **sizes)
    schedule = build("1f1b", devices=3, microbatches=4)
    pipe = jp.Pipeline(gpt_model(cfg), schedule=schedule, mesh=jp.make_mesh(3), **options)
    batch = toy_batch(8)
    params = pipe.init(jax.random.key(0), batch)
    wanted = outcome(pipe, {}, params, batch, metrics=True)
    got = outcome(pipe, FORMS[form], params, batch, metrics=True)
    for own, right in zip(got, wanted, strict=True):
        tree_allclose(own, right)
    forward = {"table": pipe._forward_table, "metrics": True}
    evaluated = outcome(pipe, FORMS[form], params, batch, **forward)
    assert evaluated.gradient is None
    tree_allclose(evaluated.loss, wanted.loss)
    tree_allclose(evaluated.metrics, wanted.metrics)


def bfloat16_error(microbatches: int, form: dict) -> float:
    """How far the weights' gradients in bfloat16 are from those in float32, over all matrices; on one device."""
    sizes: Any = {"vocab_size": 24, "max_seq_len": 6, "num_layers": 2, "num_heads": 2, "d_model": 16}
    schedule = build("interleaved_1f1b", devices=1, microbatches=microbatches, repeats=2)
    tokens, targets = np.random.default_rng(0).integers(0, 24, (2, 2 * microbatches, 6), dtype=np.int32)
    batch = {"tokens": tokens, "targets": targets}

    def gradients(dtype: Any, form: dict):
        pipe = jp.Pipeline(gpt_model(GPTConfig(dtype=dtype, **sizes)), schedule=schedule, mesh=jp.make_mesh(1))
        params = pipe.init(jax.random.key(0), batch)
        return jax.tree.map(np.asarray, outcome(pipe, form, params, batch).gradient["blocks"])

    exact, rounded = gradients("float32", {}), gradients("bfloat16", form)
    pairs = [(a, b) for a, b in zip(*map(jax.tree.leaves, (exact, rounded)), strict=True) if a.ndim == 3]
    return float(np.sqrt(sum(((a - b) ** 2).sum() for a, b in pairs) / sum((a**2).sum() for a, b in pairs)))


def test_sums_of_bfloat16_products_are_not_rounded_in_between():
    """Where one commit follows for all branches they are: the weights' gradients leave the conditional narrow."""
    error, rounded = bfloat16_error(64, FORMS["inside"]), bfloat16_error(64, FORMS["deferred"])
    print(f"relative error of the weights' gradients, M=64: {error:.2e}, rounded in between {rounded:.2e}")
    assert error < rounded
