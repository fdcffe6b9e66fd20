"""Which blocks go into which stage: the splits of an option that are worth a simulation."""

from dataclasses import replace
from functools import lru_cache

from jaxpipe.errors import PartitionError
from jaxpipe.plan.chain import Chain
from jaxpipe.plan.cost import ModelCosts
from jaxpipe.plan.partition import partition, ties
from jaxpipe.plan.price import SPLIT, ends_of, times_of, work_of
from jaxpipe.plan.problem import Option, Problem
from jaxpipe.schedule import even_stages


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
