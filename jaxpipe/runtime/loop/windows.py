"""Weights that are whole only while they are used: the loop cut into runs of ticks that need a few repeats' weights.

`breadth_first` sends all microbatches through one repeat before the next, so at most two repeats are under way at once.
Where weights rest cut over `fsdp` they are gathered repeat by repeat then, each one run of ticks before it is needed,
so that the gather can fly behind the loop. Other schedules need all repeats at once.

    ticks      0 ........ 16 ... 24 ......... 50 ... 58 ... 69      P=4, V=4, M=8
    window     {0, 1}     {1, 2} {2, 3}       {1, 2} {0, 1}
    gathered   0, 1, 2    3                   1      0

Source: Lamy-Poirier, 2023, "Breadth-First Pipeline Parallelism", section 4.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxpipe.schedule import TickTable
from jaxpipe.schedule.lowering.table import Phase

WIDTH = 2
"""Repeats that may be under way at once."""


@dataclass(frozen=True)
class Window:
    """A run of ticks.

    Attributes:
        phase: Its ticks and lanes.
        repeats: Whose weights it uses.
    """

    phase: Phase
    repeats: frozenset[int]


def windows(table: TickTable, narrow: bool) -> list[Window]:
    """The phases of a table, and whose weights each needs.

    Args:
        table: The table.
        narrow: Cut phases where another repeat begins; else every phase counts as using all.

    Example:
        >>> from jaxpipe.schedule import build, lower
        >>> table = lower(build("breadth_first", devices=4, microbatches=8, repeats=4))
        >>> [(w.phase.start, sorted(w.repeats)) for w in windows(table, narrow=True)]
        [(0, [0, 1]), (16, [1, 2]), (24, [2, 3]), (34, [3]), (35, [2, 3]), (50, [1, 2]), (58, [0, 1])]
    """
    everything = frozenset(range(table.schedule.repeats))
    if not narrow or table.schedule.repeats <= WIDTH:
        return [Window(phase, everything) for phase in table.phases]
    return [window for phase in table.phases for window in _cut(table, phase)]


def _cut(table: TickTable, phase: Phase) -> Sequence[Window]:
    found: list[Window] = []
    for tick in range(phase.start, phase.stop):
        names = [name for name in ("f_repeat", "b_repeat", "w_repeat") if name in table.columns]
        used = frozenset(repeat for name in names for repeat in table.columns[name][tick] if repeat >= 0)
        last = found[-1] if found else None
        if last and len(last.repeats | used) <= WIDTH:
            found[-1] = Window(replace(last.phase, stop=tick + 1), last.repeats | used)
        else:
            found.append(Window(replace(phase, start=tick, stop=tick + 1), used))
    return found
