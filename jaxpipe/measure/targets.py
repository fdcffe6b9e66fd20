"""Devices that are not there: XLA compiles for them, and says what a program needs, without running it."""

import importlib.util
from typing import Any

import jax
from jax.sharding import Mesh

from jaxpipe.errors import ConfigError
from jaxpipe.plan import DeviceSpec, find_device
from jaxpipe.runtime.layout.mesh import make_mesh

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""The public data sheet in XLA's text form."""


def can_compile_for_h100() -> bool:
    """Whether the extra ``gpu-aot`` is installed."""
    return importlib.util.find_spec("jax_cuda12_plugin") is not None


def h100_devices(count: int) -> list[Any]:
    """H100s to compile for, eight to a node. They cannot run anything.

    Args:
        count: How many; a multiple of 8, or fewer than 8.

    Raises:
        ConfigError: The extra ``gpu-aot`` is missing.
    """
    if not can_compile_for_h100():
        raise ConfigError(
            "compiling for an H100 without one needs the extra gpu-aot; try pip install 'jaxpipe[gpu-aot]'"
        )
    from jax.experimental import topologies

    shape = f"1x1x{count}" if count <= 8 else f"1x{count // 8}x8"
    return topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology=shape, target_config=H100
    ).devices


def mesh_of(device: DeviceSpec) -> Mesh:
    """One device to compile for, of the kind that is meant: a present one, or an H100 that is not.

    Raises:
        ConfigError: There is none here, and XLA does not know it.
    """
    if device.name == "h100" and can_compile_for_h100():
        return make_mesh(pipe=1, devices=h100_devices(1))
    if device.cores is not None:
        return make_mesh(pipe=1, devices=jax.devices("cpu"))
    first = jax.devices()[0]
    if first.platform == "cpu" or find_device(first.device_kind).name != device.name:
        raise ConfigError(
            f"--costs compiled cannot compile for {device.name!r}: here is {first.device_kind!r}, and beside it XLA "
            "knows h100 only (extra gpu-aot); try --device h100, or costs by formula (leave --costs out)"
        )
    return make_mesh(pipe=1)
