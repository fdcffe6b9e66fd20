"""Breadth-first: all microbatches through one repeat before the next repeat begins.

    breadth_first P=2 M=3 V=2 loop
    0F0 0F1 0F2 2F0 2F1 2F2 .   .   2B2 2B1 2B0 0B2 0B1 0B0
    .   1F0 1F1 1F2 3F0 3F1 3F2 3B2 3B1 3B0 1B2 1B1 1B0 .

Each device works on one stage at a time, so that with sharded weights a stage is gathered, and its gradient reduced,
once per step. Bubble time (P-1)(tF+tB)/V; every device keeps all M microbatches' activations.

Source: Lamy-Poirier 2022 (MLSys 2023), breadth-first pipeline parallelism, section 3.
"""

from jaxpipe.schedule.family import Family, Order, full_bubble
from jaxpipe.schedule.ir import Action


def order(devices: int, microbatches: int, repeats: int) -> Order:
    """By repeat, then by microbatch; the backwards in the opposite order."""
    turns = [(c, m) for c in range(repeats) for m in range(microbatches)]
    return tuple(
        tuple(Action(c * devices + device, "F", m) for c, m in turns)
        + tuple(Action(c * devices + device, "B", m) for c, m in reversed(turns))
        for device in range(devices)
    )


FAMILY = Family(order, "one stage of a device after the other", full_bubble, peak=lambda p, m, v, i: m)
