"""V-Min: a third of 1F1B's memory on the snake placement.

    v_min P=2 M=3 V=2 v
    0F0 .   .   3F0 3I0 3W0 0F1 0I0 0W0 3F1 3I1 3W1 0F2 0I1 0W1 3F2 3I2 3W2 .   0I2 0W2
    .   1F0 2F0 .   .   2I0 1I0 1F1 2F1 2W0 1W0 2I1 1I1 1F2 2F2 2W1 1W1 2I2 1I2 2W2 1W2

A microbatch's passes follow each other as closely as they can; see `stable`. Every device keeps at most ⌊(P+4)/3⌋
microbatches' activations, for about two thirds of 1F1B's bubble: with all passes equally long at most 4P-5 of them.
Where I takes longer than F, idle time also grows with M. Needs M ≥ P.

Source: Qi et al. 2024, pipeline parallelism with controllable memory, table 1 and appendix.
"""

from jaxpipe.schedule.families.craft.stable import stable_order
from jaxpipe.schedule.family import Claim, Family, Order


def order(devices: int, microbatches: int, repeats: int) -> Order:
    """Repeats the block of `starts`, then uses up the idle places at both ends."""
    del repeats  # the catalogue lets only 2 through
    gap = 2 if devices % 3 == 0 else 0

    def starts(i: int) -> dict[str, int]:
        turn = 2 * devices
        return {"F0": i, "F1": turn - 1 - i, "I1": turn + gap + i, "I0": 2 * turn + gap - 1 - i}

    return stable_order(devices, microbatches, starts, cap=2 * ((devices + 4) // 3))


def _claim(p: int, m: int, v: int, f: float, i: float, w: float) -> Claim:
    return "at most" if f == i == w else "about"


FAMILY = Family(
    order,
    "a third of 1f1b's memory",
    bubble=lambda p, m, v, f, i, w: max(0, 4 * p - 5) * f / 2,
    peak=lambda p, m, v, i: (p + 4) // 3,
    bubble_claim=_claim,
    peak_claim="at most",
    placement="v",
    repeats=2,
    least=(1, 0),
)
