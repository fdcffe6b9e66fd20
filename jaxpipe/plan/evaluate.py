"""What one way to run a model takes: seconds and bytes, from its costs and its schedule's ticks.

`plans` simulates every split and packing that may be faster than what is known.
"""

from collections.abc import Iterator

from jaxpipe.plan.bounds import split_bound
from jaxpipe.plan.cost import ModelCosts
from jaxpipe.plan.memory import StageBlocks, stage_blocks, stored_params
from jaxpipe.plan.price import SPLIT, around, ends_of, hop_of, kept, prices_of, relative_prices
from jaxpipe.plan.problem import Option, Order, Packing, Plan, Problem
from jaxpipe.plan.rhythm import Cores, Prices, Rhythm, choose, rhythms
from jaxpipe.plan.splits import splits
from jaxpipe.schedule.catalog import CATALOG

_PACKINGS: tuple[tuple[Packing, Order], ...] = (
    ("auto", "ideal"),
    ("auto", "strict"),
    ("paired", "ideal"),
    ("paired", "strict"),
    ("single", "ideal"),
    ("single", "strict"),
)


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
        if split_bound(problem, option, costs, blocks, prices) >= below:
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
    cores = None if device.cores is None else Cores(device.cores / option.stride, costs.alone)
    loop = chosen.makespan(prices, hop, ends.everywhere, cores)
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
