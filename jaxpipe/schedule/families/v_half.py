"""V-Half: half of 1F1B's memory on the snake placement.

    v_half P=2 M=3 V=2 v
    0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 0I0 3W1 0W0 3F2 3I2 0I1 3W2 0I2 0W1 0W2 .
    .   1F0 2F0 1F1 2F1 2I0 1I0 2W0 1F2 1W0 2F2 2I1 1I1 2I2 1I2 2W1 1W1 2W2 1W2

A microbatch's passes are laid out so that its activations live for about three units per device of the pipeline, where
1F1B's live for six; see `stable`. Every device keeps at most ⌊(P+2)/2⌋ microbatches' activations, for about half of
1F1B's bubble: with all passes equally long and M ≥ P, 3P-7 of them for even P ≥ 4 and 3P-4 for odd P. Needs M ≥ P.

Source: Qi et al. 2024, pipeline parallelism with controllable memory, table 1 and appendix.
"""

from jaxpipe.schedule.families.craft.stable import stable_order
from jaxpipe.schedule.family import Claim, Family, Order


def order(devices: int, microbatches: int, repeats: int) -> Order:
    """Repeats the block of `starts`, then uses up the idle places at both ends."""
    del repeats  # the catalogue lets only 2 through
    gap = 3 if devices % 2 == 0 else 0

    def starts(i: int) -> dict[str, int]:
        turn = 3 * devices - 1
        return {"F0": 2 * i, "F1": turn - 1 - i, "I1": turn + gap + 2 * i, "I0": 2 * turn + gap - i}

    return stable_order(devices, microbatches, starts, cap=2 * ((devices + 2) // 2))


def _bubble(p: int, m: int, v: int, f: float, i: float, w: float) -> float:
    return max(p - 1, 3 * p - (7 if p % 2 == 0 else 4)) * f / 2


def _claim(p: int, m: int, v: int, f: float, i: float, w: float) -> Claim:
    return "exact" if f == i == w else "about"


FAMILY = Family(
    order,
    "half of 1f1b's memory and bubble",
    _bubble,
    peak=lambda p, m, v, i: (p + 2) // 2,
    bubble_claim=_claim,
    peak_claim="at most",
    placement="v",
    repeats=2,
    least=(1, 0),
)
