"""What the planner counts where lanes are conditionals and where they are loops."""

from dataclasses import replace

import pytest

from jaxpipe.config.run import from_tables
from jaxpipe.measure.planning import gpt_shape
from jaxpipe.ops.losses import LOGITS_AT_ONCE
from jaxpipe.plan import analytic, find_device
from jaxpipe.plan.memory import memory, model_bytes, stage_blocks, terms
from jaxpipe.schedule.lowering.table import Slots

CONFIG = from_tables({"model": {"vocab_size": 256, "num_layers": 8, "num_heads": 4, "d_model": 64}})
SLOTS = Slots(activation=3, residual=2, gradient=0, weight_residual=2)


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("tensor", [1, 4])
def test_logits_count_up_to_those_computed_at_once(rows, tensor):
    """Devices that share them have each a part, until there is one chunk less for each."""
    model = replace(CONFIG.model, vocab_size=2**17, dtype="bfloat16", attention="cudnn")
    shape, device = gpt_shape(model, 1024, 9.0), find_device("h100")
    costs = analytic(shape, device, rows=rows, tensor=tensor)
    logits = rows * 1024 * 2**17 / tensor
    assert costs.head_chunks == max(1, logits / LOGITS_AT_ONCE)
    assert costs.head_working_bytes == 6 * min(logits, LOGITS_AT_ONCE)
    whole = analytic(replace(shape, logits_at_once=None), device, rows=rows, tensor=tensor)
    assert whole.head_chunks == 1 and whole.head_working_bytes == 6 * logits
    assert (costs.head_s > whole.head_s) == (costs.head_chunks > 1)  # the kernel is read for every chunk
    blocks = stage_blocks((2,) * 4, shape.kinds, 4, "loop")
    sizes = [model_bytes(c, blocks, "full", split=False, gathers=False, vocab_parallel=True) for c in (costs, whole)]
    assert [s.backward for s in sizes] == [6 * min(logits / 4, LOGITS_AT_ONCE), 6 * logits / 4]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("repeats", [1, 2])
def test_what_lanes_make_counts_and_gradients_lend_their_room(split, repeats):
    shape = gpt_shape(CONFIG.model, 64)
    costs = analytic(shape, find_device("h100"), rows=2)
    assert costs.conditional and not analytic(shape, find_device("cpu", cores=2), rows=2).conditional
    stages = 2 * repeats
    blocks = stage_blocks((8 // stages,) * stages, shape.kinds, 2, "loop")

    def sizes(conditional: bool):
        return model_bytes(replace(costs, conditional=conditional), blocks, "none", split=split, gathers=False)

    branch, loop = sizes(True), sizes(False)
    made = 8 // stages * costs.blocks["block"].params * costs.dtype_bytes
    assert loop.backward >= made
    # What I leaves and the weight gradients are never both there: I is done when W begins.
    assert branch.backward - loop.backward == pytest.approx(max(0, branch.weight_residual - made), abs=2)
    slots = SLOTS if split else replace(SLOTS, weight_residual=0)
    more, less = (sum(terms(slots, "loop", loop, scratch=c).values()) for c in (True, False))
    assert more - less == loop.residual + loop.weight_residual
    simulated = memory(slots, loop, replace(costs, conditional=False), blocks, fsdp=1)
    assert simulated.lent == pytest.approx(simulated.weights)
    found = memory(slots, branch, costs, blocks, fsdp=1)
    lent = found.weights * (1.0 if repeats == 1 else 0.75)
    assert found.lent == pytest.approx(lent - (min(made, branch.weight_residual) if split else 0))
    assert found.temporary == found.activations + found.buffers - found.lent
    assert found.total == found.weights + found.optimizer + found.activations + found.buffers


@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize("counts", [(4, 4), (5, 3), (2,) * 4])
def test_only_conditionals_that_write_no_slot_keep_one_for_idle_lanes(passes, counts):
    """Which they do not where a lane has one branch, or XLA passes buffers through all of them."""
    shape = gpt_shape(CONFIG.model, 64)
    costs = replace(analytic(shape, find_device("h100"), rows=2), passes_in_place=passes)
    blocks = stage_blocks(counts, shape.kinds, 2, "loop")
    sizes = model_bytes(costs, blocks, "none", split=True, gathers=False)
    found, others = (memory(SLOTS, sizes, c, blocks, fsdp=1) for c in (costs, replace(costs, conditional=False)))
    scratch = 0 if passes or counts == (4, 4) else sizes.residual + sizes.weight_residual
    assert found.activations - others.activations == scratch
