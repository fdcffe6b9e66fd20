"""The tables of torch.distributed.pipelining 2.13: they read, verify and simulate, and ours are not slower.

Needs torch, of which nothing runs: its generators only make orders. Skipped where it is not installed.
"""

import csv
import io
import warnings

import pytest

from jaxpipe.schedule import build, from_csv, simulate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch warns of a missing numpy when it is imported
    torch_schedules = pytest.importorskip(
        "torch.distributed.pipelining.schedules", reason="needs torch 2.13, which jaxpipe does not depend on"
    )

SINGLE = {"ScheduleGPipe": "gpipe"}
SEVERAL = {
    "ScheduleInterleaved1F1B": "interleaved_1f1b",
    "ScheduleLoopedBFS": "breadth_first",
    "ScheduleInterleavedZeroBubble": "interleaved_zb",
    "ScheduleZBVZeroBubble": "zb_v",
    "ScheduleDualPipeV": "dualpipe_v",
}
SHAPES = [(2, 4), (2, 8), (4, 8), (4, 16), (8, 16), (8, 32)]


def table_of(generator: str, devices: int, microbatches: int, repeats: int) -> str:
    """The compute-only CSV of a torch generator, made without processes or stages."""
    maker = object.__new__(getattr(torch_schedules, generator))
    maker._n_microbatches = microbatches
    if generator in SINGLE:
        maker._num_stages = devices
        order = maker._get_pipeline_order()
        kept = torch_schedules._ComputationType.REDUCE_GRAD  # communication, which it counts among its computations
        order = {rank: [a for a in row if a is None or a.computation_type != kept] for rank, row in order.items()}
    else:
        rounds = max(1, microbatches // devices)
        maker.pp_group_size, maker.n_local_stages, maker.num_stages = devices, repeats, devices * repeats
        maker._stages = [None] * repeats
        maker.number_of_rounds, maker.microbatches_per_round = rounds, microbatches // rounds
        order = {rank: maker._calculate_single_rank_operations(rank) for rank in range(devices)}
    file = io.StringIO()
    csv.writer(file).writerows(order.values())
    return file.getvalue()


CASES = [(g, n, p, m, 1) for g, n in SINGLE.items() for p, m in SHAPES] + [
    (g, n, p, m, v) for g, n in SEVERAL.items() for p, m in SHAPES for v in ((2, 4) if "Interleaved" in g else (2,))
]


@pytest.mark.parametrize(("generator", "name", "devices", "microbatches", "repeats"), CASES)
def test_tables_of_torch_run_and_ours_are_not_slower_at_equal_memory(generator, name, devices, microbatches, repeats):
    theirs = from_csv(table_of(generator, devices, microbatches, repeats))
    assert (theirs.devices, theirs.microbatches, theirs.repeats) == (devices, microbatches, repeats)
    ours = build(name, devices=devices, microbatches=microbatches, repeats=repeats)
    assert theirs.placement == ours.placement
    assert theirs.phases == ours.phases
    their_time, our_time = simulate(theirs), simulate(ours)
    assert our_time.makespan <= their_time.makespan + 1e-9
    assert max(our_time.peak_activations) <= max(their_time.peak_activations)
