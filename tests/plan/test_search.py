"""The search: nothing that it may choose is better, and better machines never get slower plans."""

from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from jaxpipe.errors import ConfigError
from jaxpipe.plan import (
    DEVICES,
    Attention,
    BlockShape,
    Mlp,
    ModelShape,
    Problem,
    Space,
    analytic,
    explain,
    find_device,
    report,
    search,
)
from jaxpipe.plan.bounds import bound, least_memory, least_s
from jaxpipe.plan.evaluate import plans
from jaxpipe.plan.search import options, way_out

H100 = find_device("h100")


def gpt(layers: int, width: int, vocab: int = 32000, seq_len: int = 1024) -> ModelShape:
    block = BlockShape("block", width, seq_len, (Attention(seq_len, seq_len, 16, width // 16),), Mlp(4 * width))
    return ModelShape(
        kinds=("block",) * layers,
        blocks={"block": block},
        width=width,
        vocab=vocab,
        carry_tokens=seq_len,
        head_tokens=seq_len,
        seq_len=seq_len,
        embed_params=vocab * width,
        head_params=vocab * width,
        tied=False,
        dtype="bfloat16",
        param_dtype="float32",
        fields={},
    )


SHAPE = gpt(12, 2048)
SPACE = Space(
    schedules=("gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v", "v_half"),
    tensor=(1,),
    fsdp=(1,),
    rows=(1, 2),
    repeats=(1, 2),
)


def problem(memory_gb: float = 74.0, device=H100, shape: ModelShape = SHAPE, **changed) -> Problem:
    fixed = {
        "shape": shape,
        "device": device,
        "devices": 8,
        "batch": 64,
        "costs": lambda rows, tensor: analytic(shape, device, rows=rows, tensor=tensor),
        "space": SPACE,
        "memory_bytes": memory_gb * 1e9,
    }
    return Problem(**{**fixed, **changed})


def test_no_plan_of_any_option_is_faster():
    asked = problem(30.0)
    best = search(asked).best
    assert best is not None
    every = [plan for o in options(asked) for plan in plans(asked, o, asked.costs(o.rows, o.tensor))]
    assert best.step_s == min(plan.step_s for plan in every if plan.memory.total <= asked.limit_bytes)


@pytest.mark.parametrize(
    ("device", "alone"), [(H100, 1.0), (find_device("cpu", cores=2), 1.8), (find_device("cpu", cores=6), 3.0)]
)
def test_bounds_are_bounds(device, alone):
    shape = replace(SHAPE, dtype="float32")

    def priced(rows, tensor):
        return replace(analytic(shape, device, rows=rows, tensor=tensor), alone=alone)

    asked = problem(device=device, shape=shape, costs=priced)
    for option in options(asked):
        costs = asked.costs(option.rows, option.tensor)
        found = list(plans(asked, option, costs))
        fastest = min(plan.step_s for plan in found)
        assert least_s(asked, option, costs) <= bound(asked, option, costs) <= fastest * (1 + 1e-9)
        assert least_memory(asked, option, costs).total <= min(plan.memory.total for plan in found)


@settings(max_examples=8, deadline=None)
@given(st.floats(8, 60), st.floats(1, 1.6))
def test_more_memory_is_never_slower(memory, times):
    less, more = (search(problem(gb), pareto=False).best for gb in (memory, memory * times))
    if less is not None:
        assert more is not None
        assert more.step_s <= less.step_s


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(("link_bytes_per_s", "network_bytes_per_s", "memory_bytes_per_s")), st.floats(1, 8))
def test_more_bandwidth_is_never_slower(name, times):
    slow = replace(H100, devices_per_host=4, link_bytes_per_s=2e10, network_bytes_per_s=5e9)
    fast = replace(slow, **{name: getattr(slow, name) * times})
    before, after = (search(problem(device=device), pareto=False).best for device in (slow, fast))
    assert before is not None
    assert after is not None
    assert after.step_s <= before.step_s * (1 + 1e-12)


def test_the_pareto_set_trades_time_for_memory():
    front = search(problem()).pareto
    assert len(front) > 1
    assert [p.step_s for p in front] == sorted(p.step_s for p in front)
    assert [p.memory.total for p in front] == sorted((p.memory.total for p in front), reverse=True)


def test_every_schedule_but_the_best_has_a_reason():
    answer = search(problem())
    assert answer.best is not None
    assert {r.schedule for r in answer.rejected} == set(SPACE.schedules) - {answer.best.option.schedule}
    assert all(r.reason for r in answer.rejected)


def test_where_nothing_fits_the_least_memory_and_the_way_there_are_known():
    asked = problem(2.0)
    answer = search(asked)
    assert answer.best is None
    assert answer.least is not None
    need = answer.least.memory.total
    assert search(replace(asked, memory_bytes=need), pareto=False).best is not None
    assert search(replace(asked, memory_bytes=need * 0.999), pareto=False).best is None
    assert "or " in way_out(answer)
    assert any("too much" in r.reason for r in answer.rejected)


def test_the_parts_of_a_step_add_up_and_changes_are_plans():
    asked = problem()
    best = search(asked, pareto=False).best
    assert best is not None
    parts = explain.parts(asked, best)
    assert sum(part.seconds for part in parts) == pytest.approx(best.step_s, rel=1e-6)
    changes = {change.name: change.step_s for change in explain.changes(asked, best)}
    more = changes["half more memory"]
    assert more is not None
    assert more <= best.step_s
    page = report.page(search(asked), parts, [explain.Change("none", None)])
    assert "<svg" in page
    assert best.option.schedule in page


def test_pins_and_given_counts_are_kept():
    pinned = search(problem(space=replace(SPACE, pipe=(4,), repeats=(1,), pinned=((0, 1),))), pareto=False).best
    given = search(problem(space=replace(SPACE, pipe=(4,), repeats=(1,), counts=(1, 4, 4, 3))), pareto=False).best
    assert pinned is not None
    assert given is not None
    assert pinned.counts[0] == 0
    assert given.counts == (1, 4, 4, 3)


@pytest.mark.parametrize("spec", DEVICES.values(), ids=DEVICES)
def test_every_number_of_a_device_has_its_source(spec):
    numbers = {name for name, value in vars(spec).items() if name not in ("name", "sources") and value is not None}
    assert numbers <= set(spec.sources)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: find_device("h10"), "try 'h100'"),
        (lambda: find_device("a100", cores=2), "cores=2 has no effect for a100"),
        (lambda: find_device("cpu", cores=0), "cores=0 must be at least 1"),
        (lambda: find_device("cpu", memory_bytes=-1.0), "must be above 0"),
        (lambda: find_device("tpu-v5e").flops_per_s("float64"), "no peak for dtype='float64'"),
        (lambda: problem(batch=0), "batch=0 must be at least 1"),
    ],
)
def test_wrong_numbers_are_refused(call, says):
    with pytest.raises(ConfigError, match=says):
        call()
