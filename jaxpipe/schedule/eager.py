"""Eager 1F1B: 1F1B with the warm-up doubled, so that a hop each way hides behind the other lane.

Devices 0..2 downwards, M = 6; each column is a tick that holds one forward and one backward:

    F0  F1  F2  F3  F4B0 F5B1 B2 …
    .   F0  F1  F2B0 …
    .   .   F0B0 F1B1 …

Bubble time (P-1)(tF+tB); device i keeps min(2(P-i)-1, M) microbatches' activations instead of 1F1B's P-i. It is the
interleaved schedule at V = 1.

Source: Zhuang et al. 2022 (Alpa's cross-mesh resharding paper), "eager-1F1B".
"""

from jaxpipe.schedule import interleaved
from jaxpipe.schedule.ir import Action


def order(devices: int, microbatches: int, repeats: int) -> tuple[tuple[Action, ...], ...]:
    """The interleaved order with one stage per device."""
    return interleaved.order(devices, microbatches, repeats)
