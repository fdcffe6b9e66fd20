"""How many blocks each stage holds: Megatron-LM's layout text, its shortest form, and the even split."""

import re
from itertools import product

import pytest
from hypothesis import given, strategies as st

from jaxpipe.errors import PartitionError
from jaxpipe.schedule import even_stages, format_stages, parse_stages


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("E|t|t|L", (0, 1, 1, 0)),
        ("Et|tt|tt|tL", (1, 2, 2, 1)),
        ("Et*3|(tt|)*29,t|L", (3, *[2] * 29, 1, 0)),
        ("Et||tL", (1, 0, 1)),
        ("E|*3L", (0, 0, 0, 0)),
        ("E(t|)*2((tt|)*2t|)*2L", (1, 1, 2, 2, 1, 2, 2, 1, 0)),
        ("E (|t)*2, tL", (0, 1, 2)),
        ("EtL", (1,)),
        ("Et*12L", (12,)),
        ("E(t)|t*0L", (1, 0)),
    ],
)
def test_layouts_of_megatron_are_read(text, counts):
    assert parse_stages(text, len(counts)) == counts


COUNTS = st.lists(st.integers(0, 5), min_size=1, max_size=40)


@given(COUNTS)
def test_a_printed_layout_reads_back(counts):
    text = format_stages(counts)
    assert parse_stages(text, len(counts)) == tuple(counts)
    assert len(text) <= len("E" + "|".join("t" * count for count in counts) + "L")
    assert format_stages(parse_stages(text, len(counts))) == text


@given(COUNTS)
def test_a_printed_layout_needs_no_more_than_two_substitutions(counts):
    """Groups first, then single symbols: what Megatron-LM unfolds, so it can read the printed text too."""
    text = re.sub(r"\(([^)]+)\)\*(\d+)", lambda m: m[1] * int(m[2]), format_stages(counts))
    text = re.sub(r"(.)\*(\d+)", lambda m: m[1] * int(m[2]), text)
    assert text == "E" + "|".join("t" * count for count in counts) + "L"


PIECES = st.recursive(
    st.sampled_from([("t", "t"), ("|", "|"), (",", "")]),
    lambda inner: st.builds(
        lambda parts, times: (
            "(" + "".join(text for text, _ in parts) + f")*{times}",
            "".join(whole for _, whole in parts) * times,
        ),
        st.lists(inner, min_size=1, max_size=4).filter(lambda parts: any(whole for _, whole in parts)),
        st.integers(1, 3),
    ),
    max_leaves=12,
)


@given(st.lists(PIECES, max_size=6))
def test_groups_nest(pieces):
    whole = "".join(symbols for _, symbols in pieces).split("|")
    text = "E" + "".join(text for text, _ in pieces) + "L"
    assert parse_stages(text, len(whole)) == tuple(map(len, whole))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Et|m|L", "'m' at 3 is a multi-token prediction layer, which jaxpipe does not have; leave it out"),
        ("Et|x|L", "'x' at 3 must be one of E t L | ( ) , or *n; try 'Et|tL'"),
        ("Et*|tL", "'*' at 2 must be one of E t L | ( ) , or *n; try 'Et|tL'"),
        ("*2Et|tL", "'*2' at 0 must follow a symbol or a group; try 't*2'"),
        ("Et*2*2|L", "'*2' at 4 must follow a symbol or a group; try 't*2'"),
        ("Et|tL)", "')' at 5 must close a '('; leave it out"),
        ("E(t|tL", "has 1 '(' without ')'; try 'E(t|tL)'"),
        ("E((t*9999)*9999)*9999|tL", "must not unfold to over 1000000 symbols"),
        ("tE|tL", "must hold E once, first in the first stage, but has it elsewhere; try 'Et|tL'"),
        ("t|tL", "must hold E once, first in the first stage, but has 0; try 'Et|tL'"),
        ("Et|Lt", "must hold L once, last in the last stage, but has it elsewhere; try 'Et|tL'"),
        ("(Et|tL)*2", "must hold E once, first in the first stage, but has 2; try 'Et|tt|tL'"),
        ("", "must hold E once, first in the first stage, but has 0; try 'EL'"),
        ("Et|tt|tL", "layout 'Et|tt|tL' has 3 stages but the schedule has 2; try 'Ett|ttL' for 4 blocks in 2 stages"),
    ],
)
def test_wrong_layouts_are_refused(text, message):
    with pytest.raises(PartitionError) as error:
        parse_stages(text, 2)
    assert message in str(error.value)


def test_an_even_split_is_even_and_spares_the_ends():
    for blocks, stages in product(range(30), range(1, 12)):
        counts = even_stages(blocks, stages)
        assert (sum(counts), len(counts)) == (blocks, stages)
        assert max(counts) - min(counts) <= 1
        assert counts[-1] == blocks // stages
        assert counts[0] == blocks // stages or blocks % stages == stages - 1


@pytest.mark.parametrize("refused", [lambda: even_stages(-1, 2), lambda: even_stages(4, 0), lambda: format_stages([])])
def test_numbers_out_of_range_are_refused(refused):
    with pytest.raises(PartitionError, match=r"must be .*; try"):
        refused()
