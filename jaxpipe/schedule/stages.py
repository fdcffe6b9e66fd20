"""How many blocks each stage holds, and the short text for it.

The text is the pipeline layout of Megatron-LM (``--pipeline-model-parallel-layout``):

    E        the embedding, first in the first stage
    t        a block
    L        head and loss, last in the last stage
    |        between two stages
    (...)    a group; groups may nest
    *n       after a symbol or a group: n times
    ,        ignored, as blanks are

Stages stand in their global order, 0 .. devices * repeats - 1: in placement `loop` the order in which Megatron-LM reads
them. Stages without blocks are allowed. ``m`` (a multi-token prediction layer) is not.
"""

import re
from collections.abc import Sequence
from itertools import groupby

from jaxpipe.errors import PartitionError

_TOKEN = re.compile(r"[EtLm|()]|\*[0-9]{1,9}|[,\s]")

_MOST = 1_000_000
"""Symbols that a text may unfold to."""


def parse_stages(text: str, stages: int) -> tuple[int, ...]:
    """Reads how many blocks each stage holds.

    Args:
        text: A layout, see this module's docstring.
        stages: How many stages the schedule has, devices times repeats.

    Returns:
        The number of blocks of each stage, in global stage order.

    Raises:
        PartitionError: The text is no layout, or one of another number of stages.

    Example:
        >>> parse_stages("Et*3|(tt|)*2,t|L", stages=5)
        (3, 2, 2, 1, 0)
    """
    symbols = _unfold(text)
    counts = tuple(stage.count("t") for stage in symbols.split("|"))
    for symbol, place, where in (("E", 0, "first"), ("L", len(symbols) - 1, "last")):
        times = symbols.count(symbol)
        if times != 1 or symbols.find(symbol) != place:
            found = "has it elsewhere" if times == 1 else f"has {times}"
            rule = f"must hold {symbol} once, {where} in the {where} stage, but {found}"
            raise PartitionError(f"layout {text!r} {rule}; try {format_stages(counts)!r}")
    if len(counts) != stages:
        nearest = format_stages(even_stages(sum(counts), stages))
        raise PartitionError(
            f"layout {text!r} has {len(counts)} stages but the schedule has {stages}; try {nearest!r} for "
            f"{sum(counts)} blocks in {stages} stages"
        )
    return counts


def format_stages(counts: Sequence[int]) -> str:
    """The short text that `parse_stages` reads back.

    Args:
        counts: Blocks of each stage, in global stage order.

    Raises:
        PartitionError: There is no stage, or one with fewer than no blocks.

    Example:
        >>> format_stages([3, 2, 2, 2, 2, 0])
        'Et*3|(tt|)*4L'
    """
    if not counts or min(counts) < 0:
        raise PartitionError(f"counts={tuple(counts)} must be one or more numbers of at least 0; try (1,)")
    runs = ["t" * count if count < 3 else f"t*{count}" for count in counts]
    runs[0], last = "E" + runs[0], len(runs) - 1
    whole = [_repeat(stage, len(list(same))) for stage, same in groupby(f"{run}|" for run in runs[:last])]
    return "".join(whole) + runs[last] + "L"


def even_stages(blocks: int, stages: int) -> tuple[int, ...]:
    """The most even split.

    Where it does not divide, stages 1, 2, ... in this order get one block more and stage 0, which holds the embedding,
    comes after them; the last stage, which holds the head, never gets one.

    Args:
        blocks: Blocks of the model.
        stages: Devices times repeats.

    Raises:
        PartitionError: A number is out of range.

    Example:
        >>> even_stages(10, 4), even_stages(11, 4)
        ((2, 3, 3, 2), (3, 3, 3, 2))
    """
    for name, value, least in (("blocks", blocks, 0), ("stages", stages, 1)):
        if value < least:
            raise PartitionError(f"{name}={value} must be at least {least}; try {least}")
    each, more = divmod(blocks, stages)
    longer = {*range(1, stages - 1), 0} if more == stages - 1 else set(range(1, more + 1))
    return tuple(each + (more > 0 and stage in longer) for stage in range(stages))


def _repeat(stage: str, times: int) -> str:
    """The shorter of a stage written often and a group."""
    group = f"{stage}*{times}" if len(stage) == 1 else f"({stage})*{times}"
    return min(stage * times, group, key=len)


def _unfold(text: str) -> str:
    """The symbols with every repetition written out."""
    # [1] open_groups[k] is what stands in the k-th open group so far; `last` is what a *n would repeat.
    open_groups, last, place = [""], "", 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            rule = "must be one of E t L | ( ) , or *n"
            raise PartitionError(f"layout {text!r}: {text[place]!r} at {place} {rule}; try 'Et|tL'")
        token = match.group()
        if token == "m":
            rule = "is a multi-token prediction layer, which jaxpipe does not have; leave it out"
            raise PartitionError(f"layout {text!r}: 'm' at {place} {rule}")
        if token == "(":
            open_groups.append("")
            last = ""
        elif token == ")":
            if len(open_groups) == 1:
                raise PartitionError(f"layout {text!r}: ')' at {place} must close a '('; leave it out")
            last = open_groups.pop()
            open_groups[-1] += last
        elif token[0] == "*":
            if not last:
                raise PartitionError(
                    f"layout {text!r}: {token!r} at {place} must follow a symbol or a group; try 't*2'"
                )
            times = int(token[1:])
            if len(open_groups[-1]) + len(last) * times > _MOST:
                raise PartitionError(f"layout {text!r}: {token!r} at {place} must not unfold to over {_MOST} symbols")
            before = open_groups[-1]
            open_groups[-1] = before[: len(before) - len(last)] + last * times
            last = ""
        elif token in "EtL|":
            open_groups[-1] += token
            last = token
        place = match.end()
    if len(open_groups) > 1:
        raise PartitionError(f"layout {text!r} has {len(open_groups) - 1} '(' without ')'; try {text + ')'!r}")
    return open_groups[0]
