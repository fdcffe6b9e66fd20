"""What a device can do, with the source of every number.

Numbers are of one device, from data sheets: dense peaks (no sparsity), bandwidths in one direction. What of it a
program reaches is `efficiency` (matrix products) and two fractions that hold for all devices, `MEMORY_FRACTION` and
`LINK_FRACTION`.
"""

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from jaxpipe.errors import ConfigError

MEMORY_FRACTION = 0.8
"""Share of the memory's bandwidth that elementwise work reaches."""

LINK_FRACTION = 0.8
"""Share of a link's bandwidth that hops and collectives reach."""


@dataclass(frozen=True)
class DeviceSpec:
    """One type of device and how it is connected.

    Attributes:
        name: What `find_device` and the command line call it.
        peak_flops: Floating-point operations per second of matrix products, by dtype.
        memory_bytes: Memory of one device.
        usable: Share of it that a program may plan with; the rest is the driver's and the libraries'.
        memory_bytes_per_s: Bandwidth of that memory.
        link_bytes_per_s: To a device of the same host, in one direction.
        network_bytes_per_s: To a device of another host, in one direction, per device.
        devices_per_host: How many devices the faster link joins.
        latency_s: Of a transfer inside a host.
        network_latency_s: Of a transfer between hosts.
        efficiency: Share of the peak that large matrix products reach.
        capability: The compute capability of NVIDIA's GPUs, by which kernels are chosen; None for other devices.
        cores: For CPUs, the cores that all devices share; None where each device computes alone.
        sources: Where each number is from, by the name of its attribute.

    Example:
        >>> find_device("h100").peak_flops["bfloat16"]
        989000000000000.0
    """

    name: str
    peak_flops: Mapping[str, float]
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    network_bytes_per_s: float
    devices_per_host: int
    sources: Mapping[str, str]
    usable: float = 0.92
    latency_s: float = 5e-6
    network_latency_s: float = 15e-6
    efficiency: float = 0.6
    capability: float | None = None
    cores: int | None = None

    def flops_per_s(self, dtype: str) -> float:
        """What matrix products of a dtype reach.

        Raises:
            ConfigError: The device has no number for it.
        """
        if dtype not in self.peak_flops:
            raise ConfigError(
                f"device {self.name} has no peak for dtype={dtype!r}; try {', '.join(map(repr, self.peak_flops))}"
            )
        return self.peak_flops[dtype] * self.efficiency

    @property
    def traffic_bytes_per_s(self) -> float:
        """What elementwise work reaches of the memory's bandwidth."""
        return self.memory_bytes_per_s * MEMORY_FRACTION

    @property
    def plan_bytes(self) -> float:
        """Memory that a program may plan with."""
        return self.memory_bytes * self.usable


_TERA, _GIGA = 1e12, 1e9
_FITTED = "fitted to the ten rows of Narayanan et al. 2021, table 1, by scripts/planner_published.py"
_ASSUMED = "the value fitted for the A100; not fitted for this device"
_RESERVE = "driver, NCCL and fragmentation; run with XLA_PYTHON_CLIENT_MEM_FRACTION=.92"
_LATENCY = "order of magnitude of one small NCCL transfer; not a data sheet's"

EFFICIENCY_A100 = 0.760
"""Share of the A100's peak that its matrix products reach in the fit of scripts/planner_published.py."""


def _gpu(name: str, sheet: str, network: str, **numbers) -> DeviceSpec:
    own = dict.fromkeys(("peak_flops", "memory_bytes", "memory_bytes_per_s", "link_bytes_per_s"), sheet)
    sources = {
        **own,
        "network_bytes_per_s": network,
        "devices_per_host": network,
        "capability": "NVIDIA CUDA C++ Programming Guide, compute capabilities",
        "usable": _RESERVE,
        "latency_s": _LATENCY,
        "network_latency_s": _LATENCY,
        "efficiency": _FITTED if name == "a100" else _ASSUMED,
    }
    return DeviceSpec(name=name, devices_per_host=8, efficiency=EFFICIENCY_A100, sources=sources, **numbers)


def _nvidia(half: float, tf32: float, double: float) -> dict[str, float]:
    """Peaks from TFLOP/s; XLA runs float32 products in TF32 unless it is asked for more."""
    return {
        "bfloat16": half * _TERA,
        "float16": half * _TERA,
        "float32": tf32 * _TERA,
        "float64": double * _TERA,
    }


def _tpu(name: str, page: str, dcn: str, **numbers) -> DeviceSpec:
    sheet = f"Google Cloud TPU documentation, {page}"
    sources = dict.fromkeys(("peak_flops", "memory_bytes", "memory_bytes_per_s", "link_bytes_per_s"), sheet)
    sources |= {
        "network_bytes_per_s": dcn,
        "devices_per_host": "chips of one slice are joined by the interconnect whatever their host",
        "usable": "the compiler's own reserve",
        "latency_s": _LATENCY,
        "network_latency_s": _LATENCY,
        "efficiency": _ASSUMED,
    }
    return DeviceSpec(name=name, efficiency=EFFICIENCY_A100, sources=sources, **numbers)


DEVICES: dict[str, DeviceSpec] = {
    spec.name: spec
    for spec in (
        _gpu(
            "a100",
            "NVIDIA A100 80GB SXM data sheet (NVLink 600 GB/s counts both directions)",
            "DGX A100 user guide: eight 200 Gb/s adapters for eight GPUs",
            capability=8.0,
            peak_flops=_nvidia(312, 156, 19.5),
            memory_bytes=80 * _GIGA,
            memory_bytes_per_s=2039 * _GIGA,
            link_bytes_per_s=300 * _GIGA,
            network_bytes_per_s=25 * _GIGA,
        ),
        _gpu(
            "h100",
            "NVIDIA H100 SXM data sheet (NVLink 900 GB/s counts both directions)",
            "DGX H100 user guide: eight 400 Gb/s adapters for eight GPUs",
            capability=9.0,
            peak_flops=_nvidia(989, 494.5, 67),
            memory_bytes=80 * _GIGA,
            memory_bytes_per_s=3350 * _GIGA,
            link_bytes_per_s=450 * _GIGA,
            network_bytes_per_s=50 * _GIGA,
        ),
        _gpu(
            "h200",
            "NVIDIA H200 SXM data sheet (NVLink 900 GB/s counts both directions)",
            "DGX H200 user guide: eight 400 Gb/s adapters for eight GPUs",
            capability=9.0,
            peak_flops=_nvidia(989, 494.5, 67),
            memory_bytes=141 * _GIGA,
            memory_bytes_per_s=4800 * _GIGA,
            link_bytes_per_s=450 * _GIGA,
            network_bytes_per_s=50 * _GIGA,
        ),
        _gpu(
            "b200",
            "NVIDIA HGX B200 data sheet: 180 GB per GPU (NVLink 1.8 TB/s counts both directions)",
            "DGX B200 user guide: eight 400 Gb/s adapters for eight GPUs",
            capability=10.0,
            peak_flops=_nvidia(2250, 1100, 40),
            memory_bytes=180 * _GIGA,
            memory_bytes_per_s=8000 * _GIGA,
            link_bytes_per_s=900 * _GIGA,
            network_bytes_per_s=50 * _GIGA,
        ),
        _tpu(
            "tpu-v5e",
            "v5e: 400 GB/s of interconnect in both directions over 4 ports, a ring uses two of them",
            "Google Cloud TPU documentation, v5e: two 100 Gb/s adapters for a host of 8 chips",
            peak_flops={"bfloat16": 197 * _TERA, "float32": 197 * _TERA / 4},
            memory_bytes=16 * _GIGA,
            memory_bytes_per_s=819 * _GIGA,
            link_bytes_per_s=100 * _GIGA,
            network_bytes_per_s=3.1 * _GIGA,
            devices_per_host=256,
        ),
        _tpu(
            "tpu-v5p",
            "v5p: 1200 GB/s of interconnect in both directions over 6 ports, a ring uses two of them",
            "Google Cloud TPU documentation, v5p: 50 Gb/s per chip",
            peak_flops={"bfloat16": 459 * _TERA, "float32": 459 * _TERA / 4},
            memory_bytes=95 * _GIGA,
            memory_bytes_per_s=2765 * _GIGA,
            link_bytes_per_s=200 * _GIGA,
            network_bytes_per_s=6.25 * _GIGA,
            devices_per_host=8960,
        ),
        DeviceSpec(
            name="cpu",
            peak_flops={name: 64 * _GIGA for name in ("float32", "bfloat16", "float16")} | {"float64": 32 * _GIGA},
            memory_bytes=8 * _GIGA,
            memory_bytes_per_s=10 * _GIGA,
            link_bytes_per_s=4 * _GIGA,
            network_bytes_per_s=1.25 * _GIGA,
            devices_per_host=256,
            usable=0.9,
            latency_s=1e-4,
            network_latency_s=2e-4,
            efficiency=0.5,
            cores=1,
            sources={
                "peak_flops": "one core with two 8-wide float32 multiply-adds per cycle at 2 GHz; narrower dtypes are "
                "computed in float32. `jaxpipe profile` measures the real one",
                "memory_bytes": "set it with --memory: simulated devices share the host's",
                "memory_bytes_per_s": "one core's share, order of magnitude; `jaxpipe profile` measures",
                "link_bytes_per_s": "a copy in memory, order of magnitude; `jaxpipe profile` measures",
                "network_bytes_per_s": "10 Gb/s Ethernet",
                "devices_per_host": "simulated devices are threads of one process",
                "usable": "the interpreter and the compiler take the rest",
                "latency_s": "a meeting of threads, order of magnitude; `jaxpipe profile` measures",
                "network_latency_s": "order of magnitude",
                "efficiency": "order of magnitude; `jaxpipe profile` measures",
                "cores": "set it with --cores",
            },
        ),
    )
}
"""By name."""

_ALIASES = {"v5e": "tpu-v5e", "v5litepod": "tpu-v5e", "v5 lite": "tpu-v5e", "v5p": "tpu-v5p", "v5": "tpu-v5p"}
"""Other words for a device, some of them what JAX calls its kind."""


def find_device(name: str, *, memory_bytes: float | None = None, cores: int | None = None) -> DeviceSpec:
    """A device by its name, or by what JAX calls its kind.

    Args:
        name: Such as ``h100``, ``NVIDIA H100 80GB HBM3``, ``TPU v5p`` or ``cpu``.
        memory_bytes: Memory that a program may plan with, in place of the data sheet's.
        cores: For ``cpu``, the cores that the devices share.

    Raises:
        ConfigError: No such device (the nearest is shown), or a number that has no effect.

    Example:
        >>> find_device("NVIDIA A100-SXM4-80GB").name, find_device("cpu", cores=2).cores
        ('a100', 2)
    """
    word = name.lower().strip()
    words = {known: known for known in DEVICES} | _ALIASES
    longest_first = sorted(words, key=len, reverse=True)
    found = [words[known] for known in longest_first if re.search(rf"(?<![a-z0-9]){known}(?![a-z0-9])", word)]
    if not found:
        near = difflib.get_close_matches(word, DEVICES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"device {name!r} is not one of {', '.join(DEVICES)}; try {near!r}")
    spec = DEVICES[found[0]]
    if memory_bytes is not None:
        if not memory_bytes > 0:
            raise ConfigError(f"memory={memory_bytes} must be above 0; try {DEVICES[spec.name].memory_bytes:.0f}")
        spec = replace(spec, memory_bytes=memory_bytes, usable=1.0)
    if cores is not None:
        if spec.cores is None:
            raise ConfigError(f"cores={cores} has no effect for {spec.name}, whose devices share none; leave it out")
        if cores < 1:
            raise ConfigError(f"cores={cores} must be at least 1; try 1")
        spec = replace(spec, cores=cores)
    return spec


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
