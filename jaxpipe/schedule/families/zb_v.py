"""ZB-V: zero bubble with 1F1B's memory, on stages placed as a snake.

    zb_v P=2 M=3 V=2 v
    0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2 .
    .   1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2

Device i holds stage i and stage 2P-1-i, so the loss is on device 0 and its gradient needs no hop. For tF = tI = tW no
device idles inside its own span, and every device keeps exactly P microbatches' activations. Needs M ≥ 2P-1.

Source: Qi et al. 2024, pipeline parallelism with controllable memory, and Qi et al. 2023, zero bubble, section 6.
"""

from jaxpipe.schedule.families.craft.halves import DeviceHalves
from jaxpipe.schedule.family import Claim, Family, Order


def order(devices: int, microbatches: int, repeats: int) -> Order:
    """Every device runs the phases of `_device_order`."""
    del repeats  # the catalogue lets only 2 through
    return tuple(_device_order(device, devices, microbatches) for device in range(devices))


def _device_order(i: int, devices: int, microbatches: int):
    run = DeviceHalves(i, devices)
    warmup, rest = 2 * (devices - i) - 1, microbatches - (2 * devices - 1 - i)
    run.times(warmup, "F0")
    run.times(i, "F1 F0")
    run.times(devices - i, "F1 I1 W1")
    run.times(rest, "F0 I0 W0 F1 I1 W1")
    run.times(microbatches - devices - rest, "I0 W0 F1 I1 W1")
    run.times(i, "I0 I1")
    run.times(devices - i, "I0 W0")
    run.times(i, "W1")
    run.times(i, "W0")
    return tuple(run.actions)


def _claim(p: int, m: int, v: int, f: float, i: float, w: float) -> Claim:
    return "exact" if f == i == w else "about"


FAMILY = Family(
    order,
    "zero bubble at 1f1b's memory, loss on device 0",
    bubble=lambda p, m, v, f, i, w: 0.0,
    peak=lambda p, m, v, i: p,
    measure="span",
    bubble_claim=_claim,
    placement="v",
    repeats=2,
    least=(2, -1),
)
