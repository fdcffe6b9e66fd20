"""Which attention a program takes: by what is asked for, by the devices it is for, and by what is computed.

What devices those are is known when the program is traced: in the loops of this library from the mesh, which may be one
of devices that are not there; elsewhere they are JAX's own.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxpipe.errors import ConfigError

Implementation = Literal["xla", "cudnn", "blockwise"]
Requested = Literal["auto", "xla", "cudnn", "blockwise"]

LONG = 1024 * 1024
"""Queries times keys from which on no array holds a number for each pair of them, if that can be chosen."""

HALF = ("bfloat16", "float16")
"""What cuDNN's kernel computes in."""

AMPERE, HOPPER = 8.0, 9.0
"""The compute capabilities from which on cuDNN has the kernel, and has it for heads wider than 128."""


@dataclass(frozen=True)
class Choice:
    """An attention and why it is taken.

    Attributes:
        name: The attention.
        reason: In a few words.
    """

    name: Implementation
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def choose(
    requested: Requested,
    *,
    capability: float | None,
    dtype: Any,
    head_dim: int,
    queries: int,
    keys: int,
    biased: bool = False,
    masked: bool = False,
) -> Choice:
    """Which attention to take.

    Args:
        requested: What is asked for; all but ``auto`` is taken as it is.
        capability: Compute capability of the NVIDIA GPUs that the program is for; None for other devices.
        dtype: What is computed in.
        head_dim: d.
        queries: T.
        keys: S.
        biased: Whether anything is added to scores.
        masked: Whether keys are hidden by more than causality and a window.

    Raises:
        ConfigError: ``cudnn`` is asked for where there is no such kernel.

    Example:
        >>> shape = {"head_dim": 128, "queries": 4096, "keys": 4096}
        >>> print(choose("auto", capability=9.0, dtype="bfloat16", **shape))
        cudnn: the fused kernel of NVIDIA GPUs
        >>> print(choose("auto", capability=None, dtype="bfloat16", **shape))
        blockwise: 4096 x 4096 scores are many, and no NVIDIA GPU computes them
    """
    if requested == "cudnn" and (against := _against_cudnn(capability, jnp.dtype(dtype).name, head_dim, False, False)):
        raise ConfigError(f"attention='cudnn' cannot be taken: {against}; try attention='auto'")
    if requested != "auto":
        return Choice(requested, "asked for")
    long = queries * keys > LONG
    whole = masked and (long or queries % 2 or keys % 2)  # as one bias, whose gradient wants even sizes
    against = _against_cudnn(capability, jnp.dtype(dtype).name, head_dim, biased, whole)
    if against is None:
        return Choice("cudnn", "the fused kernel of NVIDIA GPUs")
    if long:
        return Choice("blockwise", f"{queries} x {keys} scores are many, and {against}")
    return Choice("xla", f"{queries} x {keys} scores are few, and {against}")


def check_attention(requested: Requested, dtype: str) -> None:
    """Raises ConfigError for an attention that cannot compute in a dtype."""
    if requested == "cudnn" and dtype not in HALF:
        known = " or ".join(map(repr, HALF))
        raise ConfigError(f"dtype={dtype!r} must be {known} for attention='cudnn'; try attention='auto'")


def _against_cudnn(capability: float | None, dtype: str, head_dim: int, biased: bool, masked: object) -> str | None:
    """Why cuDNN's kernel cannot be taken, or None."""
    if capability is None:
        return "no NVIDIA GPU computes them"
    widest = 256 if capability >= HOPPER else 128
    for fails, reason in (
        (capability < AMPERE, f"cuDNN has no kernel for compute capability {capability}"),
        (dtype not in HALF, f"cuDNN's kernel has no {dtype}"),
        (head_dim % 8 or head_dim > widest, f"cuDNN's kernel has no heads of {head_dim} dims"),
        (biased, "cuDNN's kernel takes a bias only rounded and whole"),
        (masked, "cuDNN's kernel takes a mask only whole"),
    ):
        if fails:
            return reason
    return None


def capability_here() -> float | None:
    """The compute capability of the NVIDIA GPUs that what is traced now is for, None if it is for other devices."""
    meant = jax.sharding.get_abstract_mesh().abstract_device
    return capability_of(_default_device() if meant is None else meant)


def capability_of(device: Any) -> float | None:
    """The compute capability of an NVIDIA GPU, None for another device.

    Args:
        device: One of JAX's, present or only compiled for, or what stands for it in an abstract mesh.
    """
    if device.platform not in ("gpu", "cuda"):
        return None
    if is_present(device):
        found = getattr(jax.local_devices()[0], "compute_capability", "")  # "9.0"; AMD's are no numbers
        return float(found) if re.fullmatch(r"\d+\.\d+", found) else None
    # JAX asks the present devices about heads wider than 128, so without one they are not known to go.
    return AMPERE if "NVIDIA" in device.device_kind else None


def is_present(device: Any) -> bool:
    """Whether this process has a device of the same kind, and need not only compile for it."""
    first = jax.local_devices()[0]
    return (first.platform, first.device_kind) == (device.platform, device.device_kind)


def _default_device() -> Any:
    chosen: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if chosen is None or isinstance(chosen, str):
        return jax.devices(chosen)[0]
    return chosen
