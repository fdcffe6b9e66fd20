"""How long transfers take: hops between neighbours, and collectives of a group, by ring.

Groups follow `jaxpipe.runtime.layout.mesh`: the axis `tensor` is innermost, `pipe` outermost. A group is given by its
size and its stride, the number of devices from one member to the next; it stays inside a host if ``size * stride``
does.
"""

from jaxpipe.plan.device import LINK_FRACTION, DeviceSpec


def crosses_hosts(size: int, stride: int, device: DeviceSpec) -> bool:
    """Whether a group spans more than one host."""
    return size > 1 and size * stride > device.devices_per_host


def hop_s(size_bytes: float, pipe: int, stride: int, device: DeviceSpec) -> float:
    """One transfer between neighbours of the pipe; the slowest pair counts.

    Args:
        size_bytes: What one device sends.
        pipe: P.
        stride: Devices from one to the next.
        device: The devices.
    """
    if pipe == 1:
        return 0.0
    return _transfer_s(size_bytes, crosses_hosts(pipe, stride, device), device)


def all_reduce_s(size_bytes: float, group: int, stride: int, device: DeviceSpec) -> float:
    """A sum over a group that all its members get: reduce-scatter, then all-gather."""
    return 2 * gather_s(size_bytes, group, stride, device)


def gather_s(size_bytes: float, group: int, stride: int, device: DeviceSpec) -> float:
    """An all-gather to `size_bytes` in total, or a reduce-scatter from it.

    Args:
        size_bytes: The whole, not a member's share.
        group: Members.
        stride: Devices from one member to the next.
        device: The devices.
    """
    if group == 1 or not size_bytes:
        return 0.0
    steps = group - 1
    across = crosses_hosts(group, stride, device)
    latency = device.network_latency_s if across else device.latency_s
    return size_bytes * steps / group / _bandwidth(across, device) + latency * steps.bit_length()


def _transfer_s(size_bytes: float, across: bool, device: DeviceSpec) -> float:
    latency = device.network_latency_s if across else device.latency_s
    return latency + size_bytes / _bandwidth(across, device)


def _bandwidth(across: bool, device: DeviceSpec) -> float:
    return LINK_FRACTION * (device.network_bytes_per_s if across else device.link_bytes_per_s)
