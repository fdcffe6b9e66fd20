"""1F1B (PipeDream-flush): as few forwards ahead as the pipeline is deep.

    1f1b P=3 M=4 V=1 loop
    0F0 0F1 0F2 .   .   0B0 0F3 0B1 .   0B2 .   0B3
    .   1F0 1F1 .   1B0 1F2 1B1 1F3 1B2 .   1B3 .
    .   .   2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3 .   .

Bubble time (P-1)(tF+tB), like GPipe; device i keeps min(P-i, M) microbatches' activations. Run under a global tick the
strict order exposes every hop; `lower` therefore packs it in the form of `eager_1f1b` unless asked for
``memory="strict"``.

Source: Narayanan et al. 2021 (SC21), section 2.2.1.
"""

from jaxpipe.schedule.family import Family, Order, full_bubble
from jaxpipe.schedule.ir import Action


def order(devices: int, microbatches: int, repeats: int) -> Order:
    """Device i: w = min(P-1-i, M) forwards; M-w times one forward, one backward; w backwards."""
    del repeats  # the catalogue lets only 1 through
    return tuple(
        _device_order(device, min(devices - 1 - device, microbatches), microbatches) for device in range(devices)
    )


def _device_order(device: int, warmup: int, microbatches: int) -> tuple[Action, ...]:
    actions = [Action(device, "F", m) for m in range(warmup)]
    for k in range(microbatches - warmup):
        actions += [Action(device, "F", warmup + k), Action(device, "B", k)]
    actions += [Action(device, "B", m) for m in range(microbatches - warmup, microbatches)]
    return tuple(actions)


FAMILY = Family(
    order, "as few forwards ahead as devices", full_bubble, peak=lambda p, m, v, i: min(p - i, m), repeats=1
)
