"""ZB-H2: no device idles between its first and its last action, for twice 1F1B's memory.

    zb_h2 P=2 M=4 V=1 loop
    0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3 .
    .   1F0 1I0 1F1 1I1 1F2 1I2 1W0 1F3 1I3 1W1 1W2 1W3

The warm-up is long enough to reach the last device and come back. Each device's own span then has a bubble of
max(0, (P-1)(tF+tI-2tW)), zero for equal times; the makespan still holds the shift of the spans against each other,
which a synchronised optimizer step pays. At most 2P-1 microbatches' activations. Needs M ≥ 2P-1.

Source: Qi et al. 2023 (ICLR 2024), zero bubble pipeline parallelism, section 2.2.2.
"""

from jaxpipe.schedule.family import Claim, Family, Order
from jaxpipe.schedule.ir import Action


def order(devices: int, microbatches: int, repeats: int) -> Order:
    """Device i: 2(P-i)-1 forwards; then an I, from the (2i+1)-th on a W, and a forward; then the W that are left."""
    del repeats  # the catalogue lets only 1 through
    return tuple(_device_order(device, 2 * (devices - device) - 1, microbatches) for device in range(devices))


def _device_order(device: int, warmup: int, microbatches: int) -> tuple[Action, ...]:
    actions = [Action(device, "F", m) for m in range(warmup)]
    for j in range(microbatches):
        actions.append(Action(device, "I", j))
        if j >= 2 * device:
            actions.append(Action(device, "W", j - 2 * device))
        if warmup + j < microbatches:
            actions.append(Action(device, "F", warmup + j))
    actions += [Action(device, "W", m) for m in range(max(0, microbatches - 2 * device), microbatches)]
    return tuple(actions)


def _bubble(p: int, m: int, v: int, f: float, i: float, w: float) -> float:
    return max(0.0, (p - 1) * (f + i - 2 * w))


def _claim(p: int, m: int, v: int, f: float, i: float, w: float) -> Claim:
    return "exact" if w <= min(f, i) else "about"


FAMILY = Family(
    order,
    "no idle time inside a device's own span",
    _bubble,
    peak=lambda p, m, v, i: 2 * p - 1,
    measure="span",
    bubble_claim=_claim,
    peak_claim="at most",
    repeats=1,
    least=(2, -1),
)
