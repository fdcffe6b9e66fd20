"""The best way to cut a chain of blocks into stages: exact, by parametric search.

In the compiled loop every device runs one stage per tick and all wait for the slowest, so the cost of a split is its
dearest stage (the *bottleneck*). Embedding and head are costs of the first and the last stage.

How it is found is in `jaxpipe.plan.cuts`. Of splits of equal bottleneck `partition` returns the one whose cuts are
nearest to an even one; `ties` gives others, for a simulation to decide.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxpipe.errors import PartitionError
from jaxpipe.plan.chain import Chain
from jaxpipe.plan.cuts import Solver
from jaxpipe.schedule.stages import format_stages


@dataclass(frozen=True)
class Partition:
    """A split.

    Attributes:
        counts: Blocks of each stage, in stage order.
        bottleneck: Cost of the dearest stage.
        proven: Whether no split has a lower one.
    """

    counts: tuple[int, ...]
    bottleneck: float
    proven: bool = True

    @property
    def layout(self) -> str:
        """Megatron-LM's text for it, see `jaxpipe.schedule.stages`."""
        return format_stages(self.counts)


def partition(chain: Chain, *, equal: bool = False) -> Partition:
    """The split with the lowest bottleneck.

    Args:
        chain: What is to be cut.
        equal: All stages hold the same number of blocks.

    Raises:
        PartitionError: No split keeps to the limits.

    Example:
        >>> partition(Chain(costs=[1.0] * 9, stages=4, last=2.0)).layout
        'Et*3|t*3|tt|tL'
    """
    if equal:
        return _equal(chain)
    solver = Solver(chain)
    found = solver.best()
    if found is None:
        raise PartitionError(_why_not(chain))
    bound, proven = found
    cuts = solver.even(bound)
    if chain.devices and (cuts is None or not solver.fits(cuts)):
        cuts = solver.coupled(bound)
    assert cuts is not None
    return Partition(_counts(cuts), max(solver.stage_costs(cuts)), proven)


def ties(chain: Chain, bottleneck: float) -> list[tuple[int, ...]]:
    """Splits with a bottleneck of at most `bottleneck`: the most even, the fullest first, the fullest last.

    Args:
        chain: What is to be cut, without `device_bytes`.
        bottleneck: Of `partition`'s result.
    """
    solver = Solver(chain)
    found = [solver.even(bottleneck), solver.greedy(bottleneck), solver.latest(bottleneck)]
    return list(dict.fromkeys(_counts(cuts) for cuts in found if cuts is not None))


def _counts(cuts: Sequence[int]) -> tuple[int, ...]:
    return tuple(b - a for a, b in zip([0, *cuts], cuts, strict=False))


def _equal(chain: Chain) -> Partition:
    blocks = len(chain.costs)
    if blocks % chain.stages:
        near = sorted({max(1, blocks // chain.stages), -(-blocks // chain.stages)})
        raise PartitionError(
            f"{blocks} blocks must be a multiple of {chain.stages} stages for equal counts; "
            f"try {' or '.join(str(n * chain.stages) for n in near)} blocks, or equal=False"
        )
    each = blocks // chain.stages
    solver = Solver(chain)
    cuts = [each * (s + 1) for s in range(chain.stages)]
    within = all(least <= cut <= most for least, cut, most in zip(solver.at_least, cuts, solver.at_most, strict=True))
    sums = solver.bytes
    if chain.stage_bytes is not None and sums is not None:
        within &= all(sums[cut] - sums[cut - each] <= chain.stage_bytes + 1e-9 for cut in cuts)
    within &= not chain.devices or solver.fits(cuts)
    if not within:
        raise PartitionError(f"{each} blocks in each of {chain.stages} stages break a pin or a limit; try equal=False")
    return Partition(_counts(cuts), max(solver.stage_costs(cuts)))


def _why_not(chain: Chain) -> str:
    """What of the limits leaves no split."""
    blocks, where = len(chain.costs), f"{chain.stages} stages"
    if chain.bytes is not None:
        total = sum(chain.bytes)
        room = sum(chain.device_bytes) if chain.device_bytes is not None else chain.stages * (chain.stage_bytes or 0)
        if total > room:
            return f"{blocks} blocks take {total:g} bytes but {where} have room for {room:g}; try more devices"
        return f"no split of {blocks} blocks into {where} keeps to the limits of memory and pins; try {total:g} bytes"
    return f"no split of {blocks} blocks into {where} keeps to pinned={dict(chain.pinned)}; try fewer pins"
