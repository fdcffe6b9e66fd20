"""ZB-H1: 1F1B with the backward split, at 1F1B's memory.

    zb_h1 P=3 M=4 V=1 loop
    0F0 0F1 0F2 .   .   0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3
    .   1F0 1F1 .   1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3
    .   .   2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3

Weight gradients (W) depend on nothing but their own input gradient (I), so they wait until the device would idle.
Bubble time (P-1)(tF+tI-tW) for tW ≤ min(tF, tI); device i keeps at most P microbatches' activations. Needs M ≥ P.

Source: Qi et al. 2023 (ICLR 2024), zero bubble pipeline parallelism, section 2.2.1.
"""

from jaxpipe.schedule.family import Claim, Family, Order
from jaxpipe.schedule.ir import Action


def order(devices: int, microbatches: int, repeats: int) -> Order:
    """Device i: P-1-i forwards; then a forward, an I and, from the (i+1)-th I on, a W; then the W that are left."""
    del repeats  # the catalogue lets only 1 through
    return tuple(_device_order(device, devices - 1 - device, microbatches) for device in range(devices))


def _device_order(device: int, warmup: int, microbatches: int) -> tuple[Action, ...]:
    actions = [Action(device, "F", m) for m in range(warmup)]
    for j in range(microbatches):
        if warmup + j < microbatches:
            actions.append(Action(device, "F", warmup + j))
        actions.append(Action(device, "I", j))
        if j >= device:
            actions.append(Action(device, "W", j - device))
    actions += [Action(device, "W", m) for m in range(max(0, microbatches - device), microbatches)]
    return tuple(actions)


def _bubble(p: int, m: int, v: int, f: float, i: float, w: float) -> float:
    return (p - 1) * (f + i - w)


def _claim(p: int, m: int, v: int, f: float, i: float, w: float) -> Claim:
    return "exact" if w <= min(f, i) else "about"


FAMILY = Family(
    order,
    "1f1b with split backward, at its memory",
    _bubble,
    peak=lambda p, m, v, i: min(p, m),
    bubble_claim=_claim,
    peak_claim="at most",
    repeats=1,
    least=(1, 0),
)
