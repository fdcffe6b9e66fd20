"""GPipe: fill, then drain.

    gpipe P=3 M=3 V=1 loop
    0F0 0F1 0F2 .   .   .   .   0B0 0B1 0B2
    .   1F0 1F1 1F2 .   .   1B0 1B1 1B2 .
    .   .   2F0 2F1 2F2 2B0 2B1 2B2 .   .

Bubble time (P-1)(tF+tB). Device i keeps all M microbatches' activations. Not to be confused with 1F1B, which has the
same bubble and keeps at most P.

Source: Huang et al. 2019, GPipe, section 2.3.
"""

from jaxpipe.schedule.family import Family, Order, full_bubble
from jaxpipe.schedule.ir import Action


def order(devices: int, microbatches: int, repeats: int) -> Order:
    """All forwards, then all backwards, both in microbatch order."""
    del repeats  # the catalogue lets only 1 through
    return tuple(
        tuple(Action(device, phase, m) for phase in ("F", "B") for m in range(microbatches))
        for device in range(devices)
    )


FAMILY = Family(order, "fill, then drain", full_bubble, peak=lambda p, m, v, i: m, repeats=1)
