"""What one way to run a model takes: seconds and bytes, from its costs and its schedule's ticks.

`bound` says in closed form what no packing can beat; `plans` simulates.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from jaxpipe.errors import PartitionError
from jaxpipe.plan.cost import BlockCost, LaneTimes, ModelCosts, accumulator_bytes
from jaxpipe.plan.links import all_reduce_s, gather_s, hop_s
from jaxpipe.plan.memory import Memory, StageBlocks, memory, model_bytes, stage_blocks, stored_params
from jaxpipe.plan.partition import Chain, partition, ties
from jaxpipe.plan.problem import Option, Order, Packing, Plan, Problem
from jaxpipe.plan.rhythm import Prices, Rhythm, choose, rhythms
from jaxpipe.schedule import even_stages
from jaxpipe.schedule.catalog import CATALOG
from jaxpipe.schedule.table import Slots

SPLIT = frozenset(("zb_h1", "zb_h2", "interleaved_zb", "zb_v", "v_half", "v_min", "dualpipe_v"))
"""Schedules whose backwards are split into I and W."""

_PACKINGS: tuple[tuple[Packing, Order], ...] = (
    ("auto", "ideal"),
    ("auto", "strict"),
    ("paired", "ideal"),
    ("paired", "strict"),
    ("single", "ideal"),
    ("single", "strict"),
)


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


def bound(problem: Problem, option: Option, costs: ModelCosts) -> float:
    """Seconds of a step that no packing can beat, the best split taken.

    Raises:
        PartitionError: No split keeps to what was asked for.
    """
    placement = CATALOG[option.schedule].placement
    least = float("inf")
    for counts in splits(problem, option, costs):
        blocks = stage_blocks(tuple(counts), problem.shape.kinds, option.pipe, placement)
        prices = prices_of(problem, option, costs, blocks)
        least = min(least, _bound(problem, option, costs, blocks, prices))
    return least


def _bound(problem: Problem, option: Option, costs: ModelCosts, blocks: StageBlocks, prices: Prices) -> float:
    """Seconds of a step that no packing of a split can beat.

    A device does all its work, cannot start before the first microbatch has come to it, and cannot end its last input
    gradient before that has gone all the way back. For even stages that is the closed form of 1F1B and its kin.
    """
    split, pipe, m = option.schedule in SPLIT, option.pipe, option.microbatches
    gradient = prices.input if split else prices.backward
    works, chains = [0.0] * pipe, [0.0] * pipe
    for stage in range(option.stages):
        device = stage % pipe if blocks.placement == "loop" else min(stage, 2 * pipe - 1 - stage)
        chain = prices.forward[stage] + gradient[stage]
        chains[device] += chain
        works[device] += chain + (prices.weight[stage] if split else 0.0)
    before = behind = least = 0.0
    for device in range(pipe):
        least = max(least, before + m * works[device], before + m * chains[device] + behind)
        before += prices.forward[device]
        behind += gradient[device]
    cores = problem.device.cores
    if cores is not None:
        least = max(least, m * sum(works) * option.stride / cores)
    least += m * ends_of(costs, option, problem).everywhere
    return least + sum(around(problem, option, costs, stored_params(costs, blocks)))


def least_s(problem: Problem, option: Option, costs: ModelCosts) -> float:
    """Seconds of a step that no split can beat: all devices do the same and never wait."""
    split, ends = option.schedule in SPLIT, ends_of(costs, option, problem)
    blocks = _per_kind(problem.shape.kinds)
    total = sum(work_of(times_of(costs.blocks[kind], option), split) * n for kind, n in blocks)
    total += ends.first_forward + ends.first_backward + ends.last_forward
    cores = problem.device.cores
    share = max(1 / option.pipe, option.stride / cores if cores else 0.0)
    params = sum(costs.blocks[kind].params * n for kind, n in blocks) / option.pipe
    busy = option.microbatches * (total * share + ends.everywhere)
    return (busy + sum(around(problem, option, costs, params))) * (1 - 1e-9)


@lru_cache(maxsize=64)
def _per_kind(kinds: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    return tuple(Counter(kinds).items())


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


def splits(problem: Problem, option: Option, costs: ModelCosts) -> list[tuple[int, ...]]:
    """Blocks per stage that are worth a simulation; they do not depend on the memory that there is.

    The least bottleneck under every limit on the largest stage, from the most even split on: a smaller largest stage
    takes less memory.

    Raises:
        PartitionError: No split keeps to what was asked for.
    """
    space = problem.space
    if space.counts is not None:
        return [space.counts] if len(space.counts) == option.stages else []
    split, ends = option.schedule in SPLIT, ends_of(costs, option, problem)
    works = tuple(work_of(times_of(costs.blocks[kind], option), split) for kind in problem.shape.kinds)
    first = ends.first_forward + ends.first_backward
    if space.split == "even":
        return [even_stages(len(works), option.stages)]
    return list(_splits(works, option.stages, first, ends.last_forward, space.pinned, space.split == "equal"))


@lru_cache(maxsize=4096)
def _splits(
    works: tuple[float, ...],
    stages: int,
    first: float,
    last: float,
    pinned: tuple[tuple[int, int], ...],
    equal: bool,
) -> tuple[tuple[int, ...], ...]:
    chain = Chain(works, stages, first, last, bytes=(1.0,) * len(works), pinned=dict(pinned))
    if equal:
        return (partition(chain, equal=True).counts,)
    best = partition(chain)
    found = ties(chain, best.bottleneck)
    least = -(-len(works) // stages)
    for largest in range(least, max(max(counts) for counts in found)):
        limited = replace(chain, stage_bytes=float(largest))
        try:
            under = partition(limited)
        except PartitionError:
            continue
        found += ties(limited, under.bottleneck)
    if not pinned and len(works) >= stages:
        found.append(even_stages(len(works), stages))
    return tuple(dict.fromkeys(found))


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


def plans(problem: Problem, option: Option, costs: ModelCosts, below: float = float("inf")) -> Iterator[Plan]:
    """All splits and packings of an option, simulated.

    Args:
        problem: The question.
        option: What runs.
        costs: Of its microbatch.
        below: Seconds; splits that cannot be faster are left out.
    """
    placement = CATALOG[option.schedule].placement
    size = option.pipe, option.microbatches, option.repeats
    for counts in splits(problem, option, costs):
        blocks = stage_blocks(tuple(counts), problem.shape.kinds, option.pipe, placement)
        prices = prices_of(problem, option, costs, blocks)
        if _bound(problem, option, costs, blocks, prices) >= below:
            continue
        relative = relative_prices(option, blocks)
        found = rhythms(option.schedule, *size)
        seen: list[Rhythm] = []
        space = problem.space
        for packing, order in _PACKINGS:
            if space.packing not in (None, packing) or space.order not in (None, order):
                continue
            chosen = choose(found, relative, packing, order)
            if any(chosen is other for other in seen):
                continue
            seen.append(chosen)
            yield _plan(problem, option, costs, counts, blocks, prices, chosen, packing, order)


def _plan(
    problem: Problem,
    option: Option,
    costs: ModelCosts,
    counts: tuple[int, ...],
    blocks: StageBlocks,
    prices: Prices,
    chosen: Rhythm,
    packing: str,
    order: str,
) -> Plan:
    device, hop, ends = problem.device, hop_of(costs, option, problem), ends_of(costs, option, problem)
    cores = None if device.cores is None else device.cores / option.stride
    loop = chosen.makespan(prices, hop, ends.everywhere, cores, blocking=device.cores is not None)
    loop += chosen.ticks * costs.tick_s
    sync, update = around(problem, option, costs, stored_params(costs, blocks))
    step = loop + sync + update
    split = option.schedule in SPLIT
    work = sum(prices.forward) + (sum(prices.input) + sum(prices.weight) if split else sum(prices.backward))
    busy = option.microbatches * (work / option.pipe + ends.everywhere)
    flops = problem.shape.flops_per_row * problem.batch
    peak = device.peak_flops[problem.shape.dtype] * problem.devices
    return Plan(
        option=option,
        counts=counts,
        packing=packing,
        order=order,
        step_s=step,
        loop_s=loop,
        sync_s=sync,
        optimizer_s=update,
        bubble=max(0.0, 1 - busy / loop),
        hop_s=hop,
        mfu=flops / (step * peak),
        tokens_per_s=problem.batch * problem.shape.seq_len / step,
        memory=kept(option, costs, blocks, chosen.slots, split),
        ticks=chosen.ticks,
        source=costs.source,
    )


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


def least_memory(problem: Problem, option: Option, costs: ModelCosts) -> Memory:
    """Bytes per device that no split and no packing can do with less of, in closed form.

    Where a family's own form for its peak is a bound and not exact, a tenth less is taken.
    """
    family, split = CATALOG[option.schedule], option.schedule in SPLIT
    peaks = _peak_stages(option.schedule, option.pipe, option.microbatches, option.repeats)
    slots = max(1, int(peaks + 1e-6) if family.peak_claim == "exact" else int(0.9 * peaks) - 1)
    waiting = max(1, option.pipe // (4 if option.schedule == "v_min" else 2)) if split else 0
    counts = _most_even(len(problem.shape.kinds), option.stages)
    blocks = stage_blocks(counts, problem.shape.kinds, option.pipe, family.placement)
    sizes = Slots(activation=slots, residual=slots, gradient=0, weight_residual=min(waiting, option.microbatches))
    found = kept(option, costs, blocks, sizes, split)
    if len(costs.blocks) == 1:
        return found
    # [1] Where kinds differ, an uneven split may have less; not less than half.
    return Memory(0.5 * found.weights, 0.5 * found.optimizer, 0.5 * found.activations, 0.5 * found.buffers)


@lru_cache(maxsize=4096)
def _peak_stages(name: str, pipe: int, microbatches: int, repeats: int) -> float:
    peak = CATALOG[name].peak
    return repeats * max(peak(pipe, microbatches, repeats, device) for device in range(pipe))


@lru_cache(maxsize=4096)
def _most_even(blocks: int, stages: int) -> tuple[int, ...]:
    each, more = divmod(blocks, stages)
    return tuple(each + (stage < more) for stage in range(stages))
