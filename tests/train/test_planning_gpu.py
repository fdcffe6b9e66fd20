"""Temporaries that the planner predicts for H100s, beside XLA's own (extra `gpu-aot`); nothing runs."""

from dataclasses import replace

import h100
import pytest

from jaxpipe.plan import Space, find_device, search
from jaxpipe.train.compiled import compiled_costs
from jaxpipe.train.config import from_tables
from jaxpipe.train.planning import ask
from jaxpipe.train.targets import mesh_of

pytestmark = h100.MARKS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "repeats", "remat"), [("1f1b", 1, "none"), ("interleaved_1f1b", 2, "full"), ("zb_h1", 1, "full")]
)
def test_temporaries_are_within_15_percent_of_what_xla_allots(name, repeats, remat):
    layers, rows = 2 * repeats * h100.DEVICES, 2
    config = from_tables(
        {
            "model": h100.SIZES | {"num_layers": layers},
            "mesh": {"pipe": h100.DEVICES, "simulate": h100.DEVICES},
            "schedule": {"microbatches": h100.MICROBATCHES},
            "train": {"seq_len": h100.LENGTH, "batch_size": rows * h100.MICROBATCHES},
        }
    )
    device = find_device("h100")
    costs = compiled_costs(config, device, rows, (remat,), mesh_of(device))
    space = Space((name,), (h100.DEVICES,), (repeats,), (1,), (1,), (1,), (rows,), None, (remat,))
    space = replace(space, split="equal", packing="auto", order="ideal")
    asked = ask(config, device, h100.DEVICES, space=space, costs=lambda rows, tensor: costs)
    plan = search(asked, pareto=False).best
    assert plan is not None
    found = h100.step(name, repeats, remat=remat).memory.temp_size_in_bytes
    assert plan.memory.temporary == pytest.approx(found, rel=0.15)
