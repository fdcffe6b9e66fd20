"""Interleaved 1F1B, the circular schedule: activations go round the ring of devices V times.

P = 2, V = 2, M = 4. Stage c·P+i is the c-th of device i. Each tick holds one forward and one backward:

    tick       0   1   2   3   4       5       6       7       8       9   10
    device 0   0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 …
    device 1       1F0 1F1 3F0 3F1 ·   …

With the microbatches in groups of P, microbatch m at repeat c has the running index

    idx(m, c) = (m div P)·P·V + c·P + m mod P,

its forward runs on device i in tick i + idx(m, c) and its backward in tick VP-1 + (P-1-i) + idx(m, V-1-c). Then every
hop, the wrap from the last device to the first included, takes exactly one tick, and a device's order is simply its
actions by tick. For M a multiple of P this is Megatron's order, with 2(P-1-i) + (V-1)P forwards of warm-up.

When M is not a multiple of P the microbatches form M div P groups whose sizes differ by at most one (N the largest), and
backwards start in tick (V-1)N + P-1 on the last device. When M < P the one group is padded to P in the index: a compact
short group can deadlock.

Bubble time (P-1)(tF+tB)/V; device i keeps min(VP+P-1-2i, MV)/V microbatches' activations for M a multiple of P and
min((V-1)N+2P-1-2i, MV)/V otherwise. V = 1 is `eager_1f1b`: min(2(P-i)-1, M).

Source: Narayanan et al. 2021 (SC21), section 2.2.2. Differs in the handling of M not a multiple of P, which
Megatron-LM refuses or covers by a group size.
"""

from itertools import accumulate

from jaxpipe.schedule.ir import Action


def order(devices: int, microbatches: int, repeats: int) -> tuple[tuple[Action, ...], ...]:
    """Every device's actions by the tick they run in, the forward first."""
    return tuple(
        tuple(
            action for _, action in sorted(_device_ticks(device, devices, microbatches, repeats), key=_tick_then_lane)
        )
        for device in range(devices)
    )


def group_sizes(devices: int, microbatches: int) -> list[int]:
    """Sizes of the balanced groups: M div P of them (at least one), largest first.

    Example:
        >>> group_sizes(4, 11)
        [6, 5]
    """
    count = max(1, microbatches // devices)
    size, rest = divmod(microbatches, count)
    return [size + 1] * rest + [size] * (count - rest)


def forward_index(devices: int, microbatches: int, repeats: int) -> dict[tuple[int, int], int]:
    """The running index idx(m, c) of microbatch m at repeat c: its forward runs on device i in tick i + idx."""
    sizes = group_sizes(devices, microbatches)
    widths = [max(size, devices) for size in sizes]
    starts = accumulate((width * repeats for width in widths), initial=0)
    firsts = accumulate(sizes, initial=0)
    return {
        (first + j, c): start + c * width + j
        for size, width, start, first in zip(sizes, widths, starts, firsts, strict=False)
        for c in range(repeats)
        for j in range(size)
    }


def _device_ticks(device: int, devices: int, microbatches: int, repeats: int) -> list[tuple[int, Action]]:
    index = forward_index(devices, microbatches, repeats)
    largest = max(max(group_sizes(devices, microbatches)), devices)
    first_backward = (repeats - 1) * largest + devices - 1 + (devices - 1 - device)
    ticks = []
    for m, c in index:
        stage = c * devices + device
        ticks.append((device + index[m, c], Action(stage, "F", m)))
        ticks.append((first_backward + index[m, repeats - 1 - c], Action(stage, "B", m)))
    return ticks


def _tick_then_lane(entry: tuple[int, Action]) -> tuple[int, bool]:
    tick, action = entry
    return tick, action.phase == "B"
