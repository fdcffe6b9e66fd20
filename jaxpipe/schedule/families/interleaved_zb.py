"""Interleaved 1F1B with the backward split: shorter warm-up, weight gradients where the device would idle.

    interleaved_zb P=2 M=2 V=2 loop
    0F0 0F1 2F0 2F1 .   2I0 2W0 2I1 0I0 0I1 2W1 0W0 0W1
    .   1F0 1F1 3F0 3I0 3F1 3I1 1I0 1I1 3W0 3W1 1W0 1W1

The order of `interleaved_1f1b` with I in B's place and a warm-up of (P-1-i) + (V-1)P forwards (N for P where groups are
larger); each W runs as soon as its device would otherwise idle, the rest in the drain. Needs M ≥ P.
Bubble time (P-1)(tF+tI-tW)/V for tW ≤ min(tF, tI); no device keeps more than ((V-1)N + P)/V, N the largest group.

Source: Qi et al. 2023 (ICLR 2024), zero bubble, with the order of Narayanan et al. 2021 (SC21). Not to be confused with
ZB-V, which needs no ring.
"""

from jaxpipe.schedule.families import interleaved
from jaxpipe.schedule.families.craft.fill import fill_idle
from jaxpipe.schedule.family import Claim, Family, Order
from jaxpipe.schedule.ir import Action


def order(devices: int, microbatches: int, repeats: int) -> Order:
    """Warm-up, then an F and an I in turn, then the remaining I; `fill_idle` puts the W between."""
    rows = [_without_weights(device, devices, microbatches, repeats) for device in range(devices)]
    cap = round(repeats * _peak(devices, microbatches, repeats, 0))
    return fill_idle(rows, [cap] * devices, stages=devices * repeats)


def _without_weights(device: int, devices: int, microbatches: int, repeats: int) -> list[Action]:
    turns = interleaved.forward_turns(devices, microbatches, repeats)
    forwards = [Action(c * devices + device, "F", m) for c, m in turns]
    inputs = [Action((repeats - 1 - c) * devices + device, "I", m) for c, m in turns]
    largest = max(interleaved.group_sizes(devices, microbatches))
    warmup = min(devices - 1 - device + (repeats - 1) * largest, len(forwards))
    steady = [action for pair in zip(forwards[warmup:], inputs, strict=False) for action in pair]
    return forwards[:warmup] + steady + inputs[len(forwards) - warmup :]


def _peak(p: int, m: int, v: int, i: int) -> float:
    return min((v - 1) * max(interleaved.group_sizes(p, m)) + p, m * v) / v


def _bubble(p: int, m: int, v: int, f: float, i: float, w: float) -> float:
    return (p - 1) * (f + i - w) / v


def _claim(p: int, m: int, v: int, f: float, i: float, w: float) -> Claim:
    return "exact" if w <= min(f, i) else "about"


FAMILY = Family(
    order,
    "interleaved_1f1b with split backward",
    _bubble,
    peak=_peak,
    bubble_claim=_claim,
    peak_claim="at most",
    least=(1, 0),
)
