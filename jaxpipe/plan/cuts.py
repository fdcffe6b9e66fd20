"""Cuts of a chain for a given bottleneck, and the search for the lowest.

Every bottleneck is the cost of some run of blocks, with or without the ends: there are O(n²) such numbers. For a given
one, taking as many blocks as fit, stage by stage, reaches as far as any split can; so the least number for which
that reaches the end is found by bisection over the sorted candidates. Limits on memory per stage and
pinned blocks only shorten what a stage may take. Memory that the V stages of a device share couples stages that are
far apart: then a depth-first search over what each stage takes decides, most blocks first, with the uncoupled reach as
its bound (`Partition.proven` says whether it came to its end).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from jaxpipe.plan.chain import Chain

_MOST_NODES = 200_000
"""Nodes that the search under coupled limits may visit."""


class Solver:
    """Reach and cuts for a given bottleneck. A cut is the number of the first block of the next stage."""

    def __init__(self, chain: Chain):
        self.chain = chain
        self.n, self.stages = len(chain.costs), chain.stages
        self.sums = [0.0, *accumulate(chain.costs)]
        self.bytes = [0.0, *accumulate(chain.bytes)] if chain.bytes is not None else None
        # [1] at_most[s], at_least[s]: where the cut after stage s may lie because of pins.
        self.at_most, self.at_least = [self.n] * self.stages, [0] * self.stages
        for block, stage in chain.pinned.items():
            for s in range(stage):
                self.at_most[s] = min(self.at_most[s], block)
            for s in range(stage, self.stages):
                self.at_least[s] = max(self.at_least[s], block + 1)
        self.at_least[-1] = self.n
        # [2] Nodes that the coupled search has visited, and whether it ever stopped because of their number.
        self.nodes, self.gave_up = 0, False

    def stage_costs(self, cuts: Sequence[int]) -> list[float]:
        """The cost of every stage."""
        edges = [0, *cuts]
        return [self.sums[edges[s + 1]] - self.sums[edges[s]] + self._end(s) for s in range(self.stages)]

    def best(self) -> tuple[float, bool] | None:
        """The lowest bottleneck and whether it is proven; None if there is none."""
        candidates = self._candidates()
        feasible: Callable[[float], object] = self.greedy
        low = bisect_left(range(len(candidates)), True, key=lambda k: feasible(candidates[k]) is not None)
        if low == len(candidates):
            return None
        if not self.chain.devices:
            return candidates[low], True
        # [1] The uncoupled bound is where the coupled search starts; it cannot do better.
        rest = range(low, len(candidates))
        high = low + bisect_left(rest, True, key=lambda k: self.coupled(candidates[k]) is not None)
        return (candidates[high], not self.gave_up) if high < len(candidates) else None

    def _candidates(self) -> list[float]:
        ends = {0.0}
        chain, sums = self.chain, self.sums
        found = {sums[j] - sums[i] for i in range(self.n + 1) for j in range(i, self.n + 1)}
        if self.stages == 1:
            return [sums[-1] + chain.first + chain.last]
        firsts = {sums[j] + chain.first for j in range(self.n + 1)} if chain.first else ends
        lasts = {sums[-1] - sums[j] + chain.last for j in range(self.n + 1)} if chain.last else ends
        return sorted(_apart(sorted(found | firsts | lasts)))

    def _end(self, stage: int) -> float:
        chain = self.chain
        return chain.first * (stage == 0) + chain.last * (stage == self.stages - 1)

    def _reach(self, stage: int, start: int, bound: float) -> int:
        """The furthest cut after a stage that starts at a block, -1 if there is none."""
        room = bound - self._end(stage)
        slack = 1e-9 * max(1.0, abs(bound))
        if room < -slack:
            return -1
        stop = bisect_right(self.sums, self.sums[start] + room + slack, lo=start) - 1
        if self.chain.stage_bytes is not None:
            assert self.bytes is not None
            stop = min(stop, bisect_right(self.bytes, self.bytes[start] + self.chain.stage_bytes, lo=start) - 1)
        stop = min(stop, self.at_most[stage])
        return stop if stop >= max(start, self.at_least[stage]) else -1

    def greedy(self, bound: float) -> list[int] | None:
        """Every stage takes as many blocks as it can; None if they do not reach the end."""
        cuts, start = [], 0
        for stage in range(self.stages):
            start = self._reach(stage, start, bound)
            if start < 0:
                return None
            cuts.append(start)
        return cuts if start == self.n else None

    def latest(self, bound: float) -> list[int] | None:
        """Every stage, from the last one, takes as many blocks as it can."""
        least = self._least(bound)
        if least is None or least[0] > 0:
            return None
        return [*least[1:], self.n]

    def _least(self, bound: float) -> list[int] | None:
        """By stage, the first block that it may start at so that it and the stages behind it reach the end."""
        starts, stop = [0] * self.stages, self.n
        slack = 1e-9 * max(1.0, abs(bound))
        for stage in reversed(range(self.stages)):
            room = bound - self._end(stage)
            if room < -slack or stop < self.at_least[stage] or stop > self.at_most[stage]:
                return None
            start = bisect_left(self.sums, self.sums[stop] - room - slack)
            if self.chain.stage_bytes is not None:
                assert self.bytes is not None
                start = max(start, bisect_left(self.bytes, self.bytes[stop] - self.chain.stage_bytes))
            start = max(start, self.at_least[stage - 1] if stage else 0)
            if stage and start > self.at_most[stage - 1]:
                return None
            starts[stage] = stop = min(start, stop)
        return starts

    def even(self, bound: float) -> list[int] | None:
        """Cuts as near as they may be to those that share the whole cost evenly."""
        least = self._least(bound)
        if least is None or least[0] > 0:
            return None
        least = [*least[1:], self.n]
        total = self.chain.first + self.sums[-1] + self.chain.last
        cuts, start = [], 0
        for stage in range(self.stages):
            target = total * (stage + 1) / self.stages - self.chain.first
            near = bisect_left(self.sums, target)
            if 0 < near <= self.n and target - self.sums[near - 1] < self.sums[near] - target:
                near -= 1
            most = self._reach(stage, start, bound)
            if most < 0:
                return None
            start = max(start, min(max(near, least[stage]), most))
            cuts.append(start)
        return cuts

    def coupled(self, bound: float) -> list[int] | None:
        """A split within the limits of the devices, by depth-first search."""
        chain, sums = self.chain, self.bytes
        assert chain.device_bytes is not None and sums is not None
        left = list(chain.device_bytes)
        least = self._least(bound)
        if least is None:
            return None
        least = [*least[1:], self.n]
        dead: set[tuple] = set()
        cuts: list[int] = []
        self.nodes = 0

        def search(stage: int, start: int) -> bool:
            if stage == self.stages:
                return start == self.n
            key = stage, start, tuple(left)
            self.nodes += 1
            self.gave_up |= self.nodes > _MOST_NODES
            if key in dead or self.nodes > _MOST_NODES:
                return False
            device = chain.device_of(stage)
            most = self._reach(stage, start, bound)
            most = min(most, bisect_right(sums, sums[start] + left[device] + 1e-9, lo=start) - 1)
            # [1] More first: stages behind have fewer left. All numbers down to what the rest can still reach.
            for stop in range(most, max(start, least[stage], self.at_least[stage]) - 1, -1):
                used = sums[stop] - sums[start]
                left[device] -= used
                cuts.append(stop)
                if search(stage + 1, stop):
                    return True
                cuts.pop()
                left[device] += used
            dead.add(key)
            return False

        return list(cuts) if search(0, 0) else None

    def fits(self, cuts: Sequence[int]) -> bool:
        """Whether a split keeps to the limits of the devices."""
        chain, sums = self.chain, self.bytes
        assert chain.device_bytes is not None and sums is not None
        used = [0.0] * chain.devices
        for stage, (start, stop) in enumerate(zip([0, *cuts], cuts, strict=False)):
            used[chain.device_of(stage)] += sums[stop] - sums[start]
        return all(own <= most + 1e-9 for own, most in zip(used, chain.device_bytes, strict=True))


def _apart(numbers: Sequence[float]) -> Iterator[float]:
    """Of numbers that differ by rounding only, the largest."""
    for k, number in enumerate(numbers):
        if k + 1 == len(numbers) or numbers[k + 1] - number > 1e-12 * max(1.0, number):
            yield number
