"""DualPipe-V: a forward and a backward of different microbatches side by side, on stages placed as a snake.

    dualpipe_v P=2 M=4 V=2 v
    0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3 3B1 3F2 0B0 3B2 3F3 0B1 3B3 0I2 0W2 0I3 0W3
    .   1F0 2F0 1F1 2F1 1F2 2B0 2F2 1B0 1F3 2B1 2F3 1B1 2B2 1B2 2I3 1I3 2W3 1W3

Device r holds stages r and 2P-1-r. In the steady phase each F stands next to a B of the other half, so that a runtime
that runs both at once hides the communication of one behind the other; only fill and drain split the backward.
Bubble time (P-1)(tF+tI-tW)/2 where tF-tI ≤ tW ≤ tI and tI is not much longer than tF, see `_bubble`; every device keeps
(2P+1)/2 microbatches' activations. Needs M ≥ 2P.

Source: DeepSeek-AI 2025, DualPipe's `dualpipev.py`; DeepSeek-V3 report, section 3.2.1. Here only the order: whether a
pair overlaps is the runtime's business.
"""

from jaxpipe.schedule.families.craft.halves import DeviceHalves
from jaxpipe.schedule.family import Claim, Family, Order


def order(devices: int, microbatches: int, repeats: int) -> Order:
    """Every device runs the eight phases of `_device_order`."""
    del repeats  # the catalogue lets only 2 through
    return tuple(_device_order(device, devices, microbatches) for device in range(devices))


def _device_order(r: int, devices: int, microbatches: int):
    run, after = DeviceHalves(r, devices), devices - r - 1
    run.times(2 * after, "F0")
    run.times(r + 1, "F0 F1")
    run.times(after, "I1 W1 F1")
    run.times(microbatches - 2 * devices + r + 1, "F0 B1 F1 B0")
    run.times(after, "B1 F1 B0")
    # [1] The backwards of the drain are split from the middle on, their W left for where the device would idle.
    whole = 2 * ((r + 1) // 2) + (1 if r % 2 == 0 else 0)
    for place in range(2 * (r + 1)):
        half = "1" if place % 2 == 0 else "0"
        if place < whole:
            run.times(1, "B" + half)
        else:
            run.later("I" + half)
    for _ in range(after):
        run.times(1, "W")
        run.later("I0")
    run.times(len(run.waiting), "W")
    return tuple(run.actions)


def _bubble(p: int, m: int, v: int, f: float, i: float, w: float) -> float:
    return ((p - 1) * max(f + i - w, 2 * (f - w)) + max(0.0, (p - 1) * (i - f) - f)) / 2


def _claim(p: int, m: int, v: int, f: float, i: float, w: float) -> Claim:
    return "exact" if w <= i else "about"


FAMILY = Family(
    order,
    "forward and backward side by side, loss on device 0",
    _bubble,
    peak=lambda p, m, v, i: (2 * p + 1) / 2,
    bubble_claim=_claim,
    placement="v",
    repeats=2,
    least=(2, 0),
)
