"""Temporaries that the planner predicts for H100s, beside XLA's own (extra `gpu-aot`); nothing runs."""

from dataclasses import replace

import h100
import pytest

from jaxpipe.config.run import from_tables
from jaxpipe.errors import ConfigError
from jaxpipe.measure.compiled import compiled_costs
from jaxpipe.measure.planning import ask, gpt_shape
from jaxpipe.measure.targets import mesh_of
from jaxpipe.plan import Space, analytic, find_device, search

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


def test_compiled_costs_are_of_the_device_that_is_meant():
    """With sequences of 2048, scores as a whole would be more than everything else."""
    config = from_tables(
        {
            "model": h100.SIZES | {"num_layers": 2, "attention": "cudnn"},
            "train": {"seq_len": 2048, "batch_size": 8},
        }
    )
    device = find_device("h100")
    shape = gpt_shape(config.model, 2048, device.capability)
    mine, formula = compiled_costs(config, device, 1, ("full",), mesh_of(device)), analytic(shape, device, rows=1)
    block, counted = mine.blocks["block"], formula.blocks["block"]
    assert block.working_bytes["full"] < 4 * config.model.num_heads * 2048 * 2048
    assert block.weight_residual_bytes["full"] == pytest.approx(counted.weight_residual_bytes["full"], rel=0.02)
    assert mine.head_working_bytes == pytest.approx(formula.head_working_bytes, rel=0.2)
    operations = shape.blocks["block"].linear_flops + shape.blocks["block"].score_flops
    assert block.times["full"].forward >= operations / device.flops_per_s("bfloat16")
    assert block.times["full"].backward >= 3 * operations / device.flops_per_s("bfloat16")


def test_a_device_that_xla_does_not_know_is_refused():
    with pytest.raises(ConfigError, match=r"--costs compiled cannot compile for 'a100'.*try --device h100"):
        mesh_of(find_device("a100"))


def test_a_kernel_that_the_device_does_not_have_is_one_line():
    config = from_tables({"model": h100.SIZES | {"num_layers": 1, "attention": "cudnn"}, "train": {"seq_len": 128}})
    with pytest.raises(ConfigError, match=r"model.attention='cudnn' cannot be compiled for device='cpu'.*try"):
        compiled_costs(config, find_device("cpu", cores=2), 1, ("full",))
