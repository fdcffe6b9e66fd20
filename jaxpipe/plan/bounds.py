"""What no split and no packing of an option can beat, in closed form: seconds and bytes."""

from collections import Counter
from functools import lru_cache

from jaxpipe.plan.cost import ModelCosts
from jaxpipe.plan.memory import Memory, StageBlocks, stage_blocks, stored_params
from jaxpipe.plan.price import SPLIT, around, ends_of, kept, prices_of, times_of, work_of
from jaxpipe.plan.problem import Option, Problem
from jaxpipe.plan.rhythm import Prices
from jaxpipe.plan.splits import splits
from jaxpipe.schedule.catalog import CATALOG
from jaxpipe.schedule.lowering.table import Slots


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
        least = min(least, split_bound(problem, option, costs, blocks, prices))
    return least


def split_bound(problem: Problem, option: Option, costs: ModelCosts, blocks: StageBlocks, prices: Prices) -> float:
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
        least = max(least / costs.alone, m * sum(works) * option.stride / cores)
    least += m * ends_of(costs, option, problem).everywhere
    return least + sum(around(problem, option, costs, stored_params(costs, blocks)))


def least_s(problem: Problem, option: Option, costs: ModelCosts) -> float:
    """Seconds of a step that no split can beat: all devices do the same and never wait."""
    split, ends = option.schedule in SPLIT, ends_of(costs, option, problem)
    blocks = _per_kind(problem.shape.kinds)
    total = sum(work_of(times_of(costs.blocks[kind], option), split) * n for kind, n in blocks)
    total += ends.first_forward + ends.first_backward + ends.last_forward
    cores = problem.device.cores
    share = max(1 / option.pipe / costs.alone, option.stride / cores) if cores else 1 / option.pipe
    params = sum(costs.blocks[kind].params * n for kind, n in blocks) / option.pipe
    busy = option.microbatches * (total * share + ends.everywhere)
    return (busy + sum(around(problem, option, costs, params))) * (1 - 1e-9)


@lru_cache(maxsize=64)
def _per_kind(kinds: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    return tuple(Counter(kinds).items())


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
    return Memory(*(0.5 * part for part in vars(found).values()))


@lru_cache(maxsize=4096)
def _peak_stages(name: str, pipe: int, microbatches: int, repeats: int) -> float:
    peak = CATALOG[name].peak
    return repeats * max(peak(pipe, microbatches, repeats, device) for device in range(pipe))


@lru_cache(maxsize=4096)
def _most_even(blocks: int, stages: int) -> tuple[int, ...]:
    each, more = divmod(blocks, stages)
    return tuple(each + (stage < more) for stage in range(stages))
