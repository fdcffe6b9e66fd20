"""Circular: activations go round the ring V times, all forwards before all backwards.

    circular P=2 M=2 V=2 loop
    0F0 0F1 2F0 2F1 .   .   2B1 2B0 0B1 0B0
    .   1F0 1F1 3F0 3F1 3B1 3B0 1B1 1B0 .

The forwards come in groups of P microbatches, as in `interleaved_1f1b`; the backwards are their mirror image, which is
what differentiating a loop of forwards gives. Bubble time (P-1)(tF+tB)/V; every device keeps all M microbatches'
activations. With fewer microbatches than devices each round of the ring adds P-M idle places.

Source: the pipelines of praxis (Google 2022) and MaxText (Google 2023). Not to be confused with `interleaved_1f1b`,
which has the same bubble and does not keep all M.
"""

from jaxpipe.schedule.families.interleaved import forward_turns
from jaxpipe.schedule.family import Family, Order, full_bubble
from jaxpipe.schedule.ir import Action


def order(devices: int, microbatches: int, repeats: int) -> Order:
    """Each device runs its forwards by running index, then its backwards in the opposite order."""
    turns = forward_turns(devices, microbatches, repeats)
    return tuple(
        tuple(Action(c * devices + device, "F", m) for c, m in turns)
        + tuple(Action(c * devices + device, "B", m) for c, m in reversed(turns))
        for device in range(devices)
    )


FAMILY = Family(order, "round the ring V times, then back", full_bubble, peak=lambda p, m, v, i: m)
