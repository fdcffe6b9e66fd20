"""Eager 1F1B: 1F1B with the warm-up doubled, so that a hop each way hides behind the other lane.

    eager_1f1b P=3 M=4 V=1 loop
    0F0 0F1 0F2 0F3 .   0B0 .   0B1 .   0B2 .   0B3
    .   1F0 1F1 1F2 1B0 1F3 1B1 .   1B2 .   1B3 .
    .   .   2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3 .   .

In the compiled loop each tick then holds a forward and a backward: every hop has the other lane to fly behind.

Bubble time (P-1)(tF+tB); device i keeps min(2(P-i)-1, M) microbatches' activations instead of 1F1B's P-i. It is the
interleaved schedule at V = 1.

Source: Zhuang et al. 2022 (Alpa's cross-mesh resharding paper), "eager-1F1B".
"""

from jaxpipe.schedule.families import interleaved
from jaxpipe.schedule.family import Family, Order, full_bubble


def order(devices: int, microbatches: int, repeats: int) -> Order:
    """The interleaved order with one stage per device."""
    return interleaved.order(devices, microbatches, repeats)


FAMILY = Family(order, "1f1b with hidden hops", full_bubble, peak=lambda p, m, v, i: min(2 * (p - i) - 1, m), repeats=1)
