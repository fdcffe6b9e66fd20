"""Loss and every gradient leaf of the compiled loop against the unpipelined model."""

from functools import cache

import jax
import pytest
from helpers import QUICK, TOLERANCE, pairwise, toy_batch, toy_model, toy_oracle, toy_pipeline, tree_allclose

import jaxpipe as jp
from jaxpipe.errors import ScheduleError
from jaxpipe.schedule import build, from_csv

FACTORS = {
    "schedule": ["gpipe", "1f1b", "1f1b strict", "eager_1f1b", "interleaved_1f1b"],
    "devices": [1, 2, 4, 8],
    "repeats": [1, 2],
    "microbatches": [1, 3, 4, 8, 16],
    "remat": ["full", "none", "all"],
    "dropout": [0.0, 0.25],
    "tied": [False, True],
    "dtype": ["float32", "float64"],
    "blocks": [1, 2],
}


def legal(case: dict) -> bool:
    """V = 2 is only interleaved, and no model has more than 16 blocks."""
    fits = case["devices"] * case["repeats"] * case["blocks"] <= 16
    return fits and (case["repeats"] == 1 or case["schedule"] == "interleaved_1f1b")


def ids(case: dict) -> str:
    """A readable name."""
    return "-".join(f"{key[0]}{value}" for key, value in case.items())


FAST = list(pairwise(FACTORS, legal))
SLOW = [case for case in pairwise(FACTORS, legal, seed=1) if case not in FAST]

OTHERS = FACTORS | {
    "schedule": [
        "circular",
        "breadth_first",
        "zb_h1",
        "zb_h2",
        "interleaved_zb",
        "zb_v",
        "v_half",
        "v_min",
        "dualpipe_v",
    ],
    "devices": [1, 2, 4],
    "microbatches": [1, 4, 6, 9],
}


@cache
def in_catalogue(name: str, devices: int, microbatches: int, repeats: int) -> bool:
    """The catalogue has the schedule in this size."""
    try:
        build(name, devices=devices, microbatches=microbatches, repeats=repeats)
    except ScheduleError:
        return False
    return True


def buildable(case: dict) -> bool:
    """`in_catalogue` of a case."""
    return in_catalogue(case["schedule"], case["devices"], case["microbatches"], case["repeats"])


REST = list(pairwise(OTHERS, buildable))


def check(schedule, devices, repeats, microbatches, remat, dropout, tied, dtype, blocks, data=1):
    """Runs one case."""
    name, _, memory = schedule.partition(" ")
    with jax.enable_x64(dtype == "float64"):
        pipe = toy_pipeline(
            name,
            devices,
            microbatches,
            repeats,
            blocks=blocks,
            data=data,
            remat=remat,
            memory=memory or "ideal",
            dropout=dropout,
            tied=tied,
            dtype=dtype,
        )
        layers = devices * repeats * blocks
        canonical, loss, grads = toy_oracle(layers, microbatches * data, dropout, tied, dtype)
        batch = toy_batch(2 * microbatches * data)
        params = pipe.from_canonical(canonical)
        key = jax.random.key(1) if dropout else None
        got, got_grads = jax.jit(pipe.value_and_grad, compiler_options=QUICK)(params, batch, key)
        assert got.dtype == dtype
        assert abs(float(got) - float(loss)) <= TOLERANCE[dtype] * abs(float(loss))
        tree_allclose(pipe.to_canonical(got_grads), grads)


def test_the_covering_set_is_small():
    assert len(FAST) <= 60 and len(SLOW) <= 60


@pytest.mark.parametrize("case", FAST, ids=ids)
def test_gradients_equal_the_oracle(case):
    check(**case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=ids)
def test_gradients_equal_the_oracle_more_cases(case):
    check(**case)


@pytest.mark.parametrize("case", REST, ids=ids)
def test_every_other_schedule_of_the_catalogue(case):
    check(**case)


def test_a_second_stream_changes_no_number():
    """Away from GPUs the hint is ignored."""
    canonical, loss, grads = toy_oracle(4, 6, 0.0, False, "float32")
    schedule = build("zb_v", devices=2, microbatches=6, repeats=2)
    pipe = jp.Pipeline(toy_model(4), schedule=schedule, mesh=jp.make_mesh(2), second_stream=True)
    got, got_grads = jax.jit(pipe.value_and_grad)(pipe.from_canonical(canonical), toy_batch(12))
    assert abs(float(got) - float(loss)) <= TOLERANCE["float32"] * abs(float(loss))
    tree_allclose(pipe.to_canonical(got_grads), grads)


CSV = {
    "backward order of the microbatches turned round": """
        0F0,0F1,0F2,,,0B2,0B1,0B0
        ,1F0,1F1,1F2,1B2,1B1,1B0,
    """,
    "one microbatch split, the others not": """
        0F0,0F1,,,0I0,0B1,0W0,0F2,,0B2
        ,1F0,1I0,1F1,1B1,1W0,,,1F2,1B2
    """,
    "the second repeat first where it can": """
        0F0,0F1,2F0,2F1,,,,2B0,,2B1,,0B0,,0B1
        ,1F0,1F1,,3F0,3B0,3F1,3B1,,1B0,,1B1
    """,
    "a snake with uneven turns": """
        0F0,,,3F0,3B0,0F1,,,3F1,3I1,,,0B0,3W1,0I1,0W1
        ,1F0,2F0,,,2B0,1F1,2F1,,,2B1,1B0,,1B1
    """,
}


@pytest.mark.parametrize("remat", ["full", "none"])
@pytest.mark.parametrize("name", CSV)
def test_hand_written_schedules(name, remat):
    schedule = from_csv("\n".join(line.strip() for line in CSV[name].strip().splitlines()) + "\n")
    model = toy_model(schedule.stages, 0.25, True)
    pipe = jp.Pipeline(model, schedule=schedule, mesh=jp.make_mesh(schedule.devices), remat=remat)
    rows = 2 * schedule.microbatches
    canonical, loss, grads = toy_oracle(schedule.stages, schedule.microbatches, 0.25, True, "float32")
    step = jax.jit(pipe.value_and_grad, compiler_options=QUICK)
    got, got_grads = step(pipe.from_canonical(canonical), toy_batch(rows), jax.random.key(1))
    assert float(got) == pytest.approx(float(loss), rel=1e-5)
    tree_allclose(pipe.to_canonical(got_grads), grads)


@pytest.mark.parametrize("remat", ["full", "none"])
@pytest.mark.parametrize("devices", [1, 2])
def test_data_shards_see_the_row_groups_of_the_global_batch(devices, remat):
    check("interleaved_1f1b", devices, 2, 4, remat, 0.25, True, "float32", 1, data=4)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize(
    ("schedule", "devices", "repeats"), [("1f1b", 4, 1), ("gpipe", 2, 1), ("interleaved_1f1b", 2, 2)]
)
def test_forward_only_loss_equals_the_training_loss(schedule, devices, repeats, dropout):
    pipe = toy_pipeline(schedule, devices, 4, repeats, dropout=dropout)
    canonical, loss, _ = toy_oracle(devices * repeats, 4, dropout, False, "float32")
    got = pipe.loss(pipe.from_canonical(canonical), toy_batch(8), jax.random.key(1) if dropout else None)
    assert float(got) == pytest.approx(float(loss), rel=1e-6)


def test_old_style_keys_give_the_same_numbers():
    pipe = toy_pipeline("1f1b", 2, 2, dropout=0.25)
    batch = toy_batch(4)
    params = pipe.init(jax.random.key(0), batch)
    new, old = (pipe.loss(params, batch, key) for key in (jax.random.key(3), jax.random.PRNGKey(3)))
    assert float(new) == float(old)


def test_a_microbatch_whose_mask_is_empty_changes_nothing_but_its_weight():
    pipe = toy_pipeline("1f1b", 2, 2)
    batch = toy_batch(4)
    batch["mask"][:2] = 0
    params = pipe.init(jax.random.key(0), batch)
    loss, grads = jax.jit(pipe.value_and_grad)(params, batch)
    half = {name: leaf[2:] for name, leaf in batch.items()}
    oracle = jp.sequential(pipe.model)
    expected, expected_grads = oracle.value_and_grad(pipe.to_canonical(params), half)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    tree_allclose(pipe.to_canonical(grads), expected_grads)
