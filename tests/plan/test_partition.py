"""Splits are the best there are: held to brute force on small chains."""

from itertools import combinations_with_replacement, pairwise

import pytest
from hypothesis import given, settings, strategies as st

from jaxpipe.errors import PartitionError
from jaxpipe.plan.chain import Chain
from jaxpipe.plan.partition import partition, ties
from jaxpipe.schedule import parse_stages


def brute(chain: Chain) -> float | None:
    """The lowest bottleneck of all splits within the limits."""
    best = None
    for cuts in combinations_with_replacement(range(len(chain.costs) + 1), chain.stages - 1):
        edges = [0, *cuts, len(chain.costs)]
        costs = [sum(chain.costs[a:b]) for a, b in pairwise(edges)]
        costs[0] += chain.first
        costs[-1] += chain.last
        if all(edges[s] <= block < edges[s + 1] for block, s in chain.pinned.items()) and fits(chain, edges):
            best = min(max(costs), best or max(costs))
    return best


def fits(chain: Chain, edges: list[int]) -> bool:
    if chain.bytes is None:
        return True
    used = [sum(chain.bytes[a:b]) for a, b in pairwise(edges)]
    if chain.stage_bytes is not None and max(used) > chain.stage_bytes:
        return False
    kept = [0.0] * chain.devices
    for stage, size in enumerate(used if chain.devices else ()):
        kept[chain.device_of(stage)] += size
    return chain.device_bytes is None or all(a <= b for a, b in zip(kept, chain.device_bytes, strict=True))


@st.composite
def chains(draw) -> Chain:
    blocks = draw(st.integers(1, 8))
    devices, repeats = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    stages = devices * repeats
    limited = draw(st.sampled_from(("free", "stage", "device")))
    pins = draw(st.dictionaries(st.integers(0, blocks - 1), st.integers(0, stages - 1), max_size=1))
    return Chain(
        costs=draw(st.lists(st.sampled_from((0.5, 1.0, 1.1, 3.0)), min_size=blocks, max_size=blocks)),
        stages=stages,
        first=draw(st.sampled_from((0.0, 0.3, 2.0))),
        last=draw(st.sampled_from((0.0, 1.7, 4.0))),
        bytes=draw(st.lists(st.integers(1, 4), min_size=blocks, max_size=blocks)),
        stage_bytes=draw(st.integers(1, 12)) if limited == "stage" else None,
        device_bytes=draw(st.lists(st.integers(1, 20), min_size=devices, max_size=devices))
        if limited == "device"
        else None,
        placement=draw(st.sampled_from(("loop", "v"))) if repeats == 2 else "loop",
        pinned=pins,
    )


@settings(max_examples=150, deadline=None)
@given(chains())
def test_no_split_within_the_limits_has_a_lower_bottleneck(chain):
    least = brute(chain)
    if least is None:
        with pytest.raises(PartitionError):
            partition(chain)
        return
    found = partition(chain)
    assert found.proven
    assert found.bottleneck == pytest.approx(least)
    edges = [sum(found.counts[:s]) for s in range(chain.stages + 1)]
    assert edges[-1] == len(chain.costs)
    assert fits(chain, edges)
    if not chain.devices:
        for counts in ties(chain, found.bottleneck):
            assert sum(counts) == len(chain.costs)


def test_a_heavy_head_takes_blocks_off_the_last_stage():
    found = partition(Chain(costs=[1.0] * 10, stages=4, last=2.0))
    assert found.counts == (3, 3, 3, 1)
    assert parse_stages(found.layout, 4) == found.counts


def test_two_hundred_blocks_in_64_stages():
    chain = Chain([1 + 0.1 * (i % 3) for i in range(200)], 64, first=0.7, last=3.0)
    found = partition(chain)
    assert found.proven
    assert found.bottleneck == pytest.approx(4.5)


@pytest.mark.parametrize(
    ("chain", "equal", "says"),
    [
        (Chain([1.0] * 10, 4), True, "try 8 or 12 blocks"),
        (Chain([1.0] * 4, 2, bytes=[3.0] * 4, stage_bytes=5.0), False, "have room for 10"),
    ],
)
def test_what_cannot_be_split_says_why(chain, equal, says):
    with pytest.raises(PartitionError, match=says):
        partition(chain, equal=equal)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"stages": 0}, "stages=0 must be at least 1"),
        ({"pinned": {9: 0}}, "out of range"),
        ({"pinned": {0: 1, 1: 0}}, "must not lie before stage 1"),
        ({"stage_bytes": 3.0}, "one per block; try 4"),
    ],
)
def test_wrong_chains_are_refused(wrong, says):
    with pytest.raises(PartitionError, match=says):
        Chain(**{"costs": [1.0] * 4, "stages": 2, **wrong})
