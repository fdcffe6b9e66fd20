"""Interleaved 1F1B, the circular schedule: activations go round the ring of devices V times.

    interleaved_1f1b P=2 M=4 V=2 loop
    0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 .   2B2 .   2B3 0B2 0B3
    .   1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3 .

Stage c·P+i is the c-th of device i. In the compiled loop each tick holds one forward and one backward.
With the microbatches in groups of P, microbatch m at repeat c has the running index

    idx(m, c) = (m div P)·P·V + c·P + m mod P,

its forward runs on device i in tick i + idx(m, c) and its backward in tick VP-1 + (P-1-i) + idx(m, V-1-c). Then every
hop, the wrap from the last device to the first included, takes exactly one tick, and a device's order is simply its
actions by tick. For M a multiple of P this is Megatron's order, with 2(P-1-i) + (V-1)P forwards of warm-up.

When M is not a multiple of P the microbatches form M div P groups whose sizes differ by at most one (N the largest),
and backwards start in tick (V-1)N + P-1 on the last device. When M < P the one group is padded to P in the index: a
compact short group can deadlock.

Bubble time (P-1)(tF+tB)/V; device i keeps min((V-1)N + 2P-1-2i, MV)/V microbatches' activations, where N = P if P
divides M. V = 1 is `eager_1f1b`: min(2(P-i)-1, M). When M < P every round of the ring adds P-M idle places, and N = M.

Source: Narayanan et al. 2021 (SC21), section 2.2.2. Differs in the handling of M not a multiple of P, which
Megatron-LM refuses or covers by a group size.
"""

from itertools import accumulate

from jaxpipe.errors import ScheduleError
from jaxpipe.schedule.family import Family, Order, full_bubble
from jaxpipe.schedule.ir import Action


def order(devices: int, microbatches: int, repeats: int, group_size: int | None = None) -> Order:
    """Every device's actions by the tick they run in, the forward first."""
    sizes = group_sizes(devices, microbatches, group_size)
    return tuple(
        tuple(action for _, action in sorted(_device_ticks(device, devices, repeats, sizes), key=_tick_then_lane))
        for device in range(devices)
    )


def group_sizes(devices: int, microbatches: int, group_size: int | None = None) -> list[int]:
    """Sizes of the groups of microbatches that go round the ring together.

    Without a `group_size` they are balanced: M div P of them (at least one), largest first. With one, all have it but
    the last, which holds the rest.

    Raises:
        ScheduleError: `group_size` is not between devices and microbatches.

    Example:
        >>> group_sizes(4, 11), group_sizes(4, 11, group_size=4)
        ([6, 5], [4, 4, 3])
    """
    if group_size is None:
        count = max(1, microbatches // devices)
        size, rest = divmod(microbatches, count)
        return [size + 1] * rest + [size] * (count - rest)
    if not devices <= group_size <= microbatches:
        nearest = f"try {min(max(group_size, devices), microbatches)}"
        raise ScheduleError(
            f"group_size={group_size} must be between devices={devices} and microbatches={microbatches}; "
            + (nearest if devices <= microbatches else "leave it out")
        )
    rest = microbatches % group_size
    return [group_size] * (microbatches // group_size) + [rest] * (rest > 0)


def forward_index(devices: int, repeats: int, sizes: list[int]) -> dict[tuple[int, int], int]:
    """The running index idx(m, c) of microbatch m at repeat c: its forward runs on device i in tick i + idx."""
    widths = [max(size, devices) for size in sizes]
    starts = accumulate((width * repeats for width in widths), initial=0)
    firsts = accumulate(sizes, initial=0)
    return {
        (first + j, c): start + c * width + j
        for size, width, start, first in zip(sizes, widths, starts, firsts, strict=False)
        for c in range(repeats)
        for j in range(size)
    }


def forward_turns(devices: int, microbatches: int, repeats: int) -> list[tuple[int, int]]:
    """The (repeat, microbatch) of every device's forwards, in order."""
    index = forward_index(devices, repeats, group_sizes(devices, microbatches))
    return [(c, m) for m, c in sorted(index, key=index.__getitem__)]


def _device_ticks(device: int, devices: int, repeats: int, sizes: list[int]) -> list[tuple[int, Action]]:
    index = forward_index(devices, repeats, sizes)
    first_backward = (repeats - 1) * max(*sizes, devices) + devices - 1 + (devices - 1 - device)
    ticks = []
    for m, c in index:
        stage = c * devices + device
        ticks.append((device + index[m, c], Action(stage, "F", m)))
        ticks.append((first_backward + index[m, repeats - 1 - c], Action(stage, "B", m)))
    return ticks


def _tick_then_lane(entry: tuple[int, Action]) -> tuple[int, bool]:
    tick, action = entry
    return tick, action.phase == "B"


def peak(p: int, m: int, v: int, device: int) -> float:
    """Activations kept without a `group_size`."""
    return min((v - 1) * max(group_sizes(p, m)) + 2 * p - 1 - 2 * device, m * v) / v


FAMILY = Family(order, "activations go round the ring V times", full_bubble, peak, options=frozenset({"group_size"}))
