"""What an option costs: the seconds of its actions and around its loop, and the bytes per device."""

from dataclasses import dataclass, replace

from jaxpipe.plan.cost import BlockCost, LaneTimes, ModelCosts, accumulator_bytes
from jaxpipe.plan.links import all_reduce_s, gather_s, hop_s
from jaxpipe.plan.memory import Memory, StageBlocks, memory, model_bytes
from jaxpipe.plan.problem import Option, Problem
from jaxpipe.plan.rhythm import Prices
from jaxpipe.schedule.lowering.table import Slots

SPLIT = frozenset(("zb_h1", "zb_h2", "interleaved_zb", "zb_v", "v_half", "v_min", "dualpipe_v"))
"""Schedules whose backwards are split into I and W."""


@dataclass(frozen=True)
class Ends:
    """Seconds of embedding and head, where they are computed.

    Attributes:
        first_forward: Added to stage 0's F.
        first_backward: Added to its B or I.
        last_forward: Added to the last stage's F.
        everywhere: Of a head that all devices run.
    """

    first_forward: float
    first_backward: float
    last_forward: float
    everywhere: float


def times_of(block: BlockCost, option: Option) -> LaneTimes:
    """The lanes of a block under an option."""
    return block.times[option.remat]


def work_of(times: LaneTimes, split: bool) -> float:
    """Seconds of a block's forward and backward."""
    return times.forward + (times.input + times.weight if split else times.backward)


def ends_of(costs: ModelCosts, option: Option, problem: Problem) -> Ends:
    """The seconds of embedding and head under an option."""
    if option.head == "last":
        return Ends(costs.embed_forward_s, costs.embed_backward_s, costs.head_s, 0.0)
    moved = 2 * gather_s(2 * costs.carry_bytes, option.pipe, option.stride, problem.device)
    return Ends(costs.embed_forward_s, costs.embed_backward_s, 0.0, costs.head_s / option.pipe + moved)


def hop_of(costs: ModelCosts, option: Option, problem: Problem) -> float:
    """Seconds of a hop."""
    if option.pipe == 1:
        return 0.0
    if costs.hop_s is not None:
        return costs.hop_s
    return hop_s(costs.carry_bytes, option.pipe, option.stride, problem.device)


def around(problem: Problem, option: Option, costs: ModelCosts, whole: float) -> tuple[float, float]:
    """Seconds around the loop: transfers, and the optimizer.

    Args:
        problem: The question.
        option: What runs.
        costs: Of its microbatch.
        whole: Parameters of blocks that a device holds.
    """
    device, sums = problem.device, accumulator_bytes(costs)
    ends, compute = costs.ends_params, min(costs.dtype_bytes, costs.param_bytes)
    own = ends / option.pipe
    seconds = gather_s(ends * compute, option.pipe, option.stride, device)
    seconds += gather_s(ends * sums, option.pipe, option.stride, device)
    seconds += all_reduce_s((whole + own) * sums / option.fsdp, option.data, option.fsdp * option.tensor, device)
    seconds += gather_s((whole + own) * compute, option.fsdp, option.tensor, device)
    seconds += gather_s((whole + own) * sums, option.fsdp, option.tensor, device)
    # [1] AdamW reads a parameter, its gradient and two moments, and writes all but the gradient.
    update = (whole + own) / option.fsdp * (6 * costs.param_bytes + sums) / device.traffic_bytes_per_s
    if device.cores is not None:
        update *= max(1.0, problem.devices / device.cores)
    return seconds, update


def prices_of(problem: Problem, option: Option, costs: ModelCosts, blocks: StageBlocks) -> Prices:
    """Times of every stage's actions, ends included."""
    lanes = {kind: times_of(block, option) for kind, block in costs.blocks.items()}
    ends = ends_of(costs, option, problem)

    def column(name: str) -> list[float]:
        return [sum(getattr(lanes[kind], name) * n for kind, n in row.items()) for row in blocks.kinds]

    forward, backward, inputs, weight = map(column, ("forward", "backward", "input", "weight"))
    forward[0] += ends.first_forward
    forward[-1] += ends.last_forward
    backward[0] += ends.first_backward
    inputs[0] += ends.first_backward
    return Prices([*forward, 0.0], [*backward, 0.0], [*inputs, 0.0], [*weight, 0.0])


def relative_prices(option: Option, blocks: StageBlocks) -> Prices:
    """The prices by which `Pipeline` chooses a packing, see `jaxpipe.schedule.costs.relative_costs`."""
    counts = [sum(row.values()) for row in blocks.kinds]
    total = max(1, sum(counts))
    even = len(set(counts)) == 1
    times = [1 / option.repeats if even else count * option.pipe / total for count in counts]
    again = [time if option.remat == "full" else 0.0 for time in times]
    both = [2 * time + more for time, more in zip(times, again, strict=True)]
    inputs = [time + more for time, more in zip(times, again, strict=True)]
    return Prices([*times, 0.0], [*both, 0.0], [*inputs, 0.0], [*times, 0.0])


def kept(option: Option, costs: ModelCosts, blocks: StageBlocks, slots: Slots, split: bool) -> Memory:
    """Bytes per device for given slots."""
    sizes = model_bytes(
        costs,
        blocks,
        option.remat,
        split=split,
        gathers=option.fsdp > 1,
        vocab_parallel=option.head == "vocab_parallel",
    )
    if option.remat == "full":
        slots = replace(slots, residual=0)
    return memory(slots, sizes, costs, blocks, fsdp=option.fsdp)
