"""Inference: forwards only, in the order of `interleaved_1f1b`'s.

    inference P=2 M=4 V=2 loop
    0F0 0F1 2F0 2F1 0F2 0F3 2F2 2F3 .
    .   1F0 1F1 3F0 3F1 1F2 1F3 3F2 3F3

Bubble time (P-1)tF/V. Nothing is kept: a stage's activations live only while it runs.
"""

from jaxpipe.schedule.families.interleaved import forward_turns
from jaxpipe.schedule.family import Family, Order, full_bubble
from jaxpipe.schedule.ir import Action


def order(devices: int, microbatches: int, repeats: int) -> Order:
    """Each device runs its forwards by running index."""
    turns = forward_turns(devices, microbatches, repeats)
    return tuple(tuple(Action(c * devices + device, "F", m) for c, m in turns) for device in range(devices))


FAMILY = Family(
    order,
    "forward only",
    bubble=lambda p, m, v, f, i, w: full_bubble(p, m, v, f, 0.0, 0.0),
    peak=lambda p, m, v, i: 1 / v,
)
