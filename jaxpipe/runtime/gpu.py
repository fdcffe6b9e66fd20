"""The settings of XLA that matter for pipelines on GPUs, and those that break them.

XLA reads them from the environment when JAX's devices are first touched, so they are set before. On CPUs none is set.
None of them has been timed on a GPU; what each is for was read off programs compiled for H100s, see docs/gpus.md.
"""

import importlib.util
import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Literal

import jax

from jaxpipe.errors import ConfigError
from jaxpipe.jax_internals import devices_are_in_use

MEMORY = "XLA_CLIENT_MEM_FRACTION"
OLD_MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"
FLAGS = "XLA_FLAGS"
OVERLAP = "--xla_gpu_experimental_parallel_collective_overlap_limit"
COMMANDS = "--xla_gpu_enable_command_buffer"
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")

_BREAKS = "rewrites a loop that is pipelined already: compile errors and crashes were seen"
FORBIDDEN: dict[str, tuple[str, tuple[str, ...]]] = {
    "--xla_gpu_enable_pipelined_p2p": (_BREAKS, ("false", "0")),
    "--xla_gpu_experimental_pipeline_parallelism_opt_level": (_BREAKS, ("PIPELINE_PARALLELISM_OPT_LEVEL_DISABLE",)),
    "--xla_gpu_enable_while_loop_double_buffering": (_BREAKS, ("false", "0")),
    "--xla_gpu_enable_while_loop_unrolling": (_BREAKS, ("WHILE_LOOP_UNROLLING_NO_UNROLL",)),
    "--xla_gpu_disable_async_collectives": ("lets no hop fly while a lane computes", ()),
}
"""Flags that jaxpipe refuses: why, and with which values they do no harm."""


@dataclass(frozen=True)
class GpuOptions:
    """What `set_gpu_options` sets. The defaults change nothing about how programs are compiled.

    Attributes:
        memory_fraction: Share of each GPU's memory that JAX takes at once. The rest is for NCCL, cuBLAS and CUDA
            itself; JAX's own default is 0.75.
        collectives_in_flight: How many collectives XLA may keep in flight. 1 is XLA's default: of two hops that a lane
            starts, one flies. More lets both fly, and with tensor parallelism two collectives of different groups,
            which may deadlock NCCL: unverified.
        second_stream: Gives the second hop of a lane on placement ``v`` a stream of its own, see `Pipeline`: the same
            end by another, undocumented way, with the same doubt.
        command_buffers: ``default`` leaves XLA's choice of what is launched as CUDA graphs. ``off`` launches every
            kernel by itself: slower, and a way to find out whether a crash comes from graphs. ``loops`` adds loops and
            conditionals, so that an idle lane need not ask the host: CUDA 12.3 or later, unverified.
    """

    memory_fraction: float = 0.9
    collectives_in_flight: int = 1
    second_stream: bool = False
    command_buffers: Literal["default", "off", "loops"] = "default"

    def __post_init__(self):
        if not 0.0 < self.memory_fraction <= 1.0:
            raise ConfigError(f"gpu.memory_fraction={self.memory_fraction} must be above 0 and at most 1; try 0.9")
        if not 1 <= self.collectives_in_flight <= 8:
            near = min(max(self.collectives_in_flight, 1), 8)
            raise ConfigError(f"gpu.collectives_in_flight={self.collectives_in_flight} must be from 1 to 8; try {near}")
        if self.command_buffers not in ("default", "off", "loops"):
            raise ConfigError(
                f"gpu.command_buffers={self.command_buffers!r} must be 'default', 'off' or 'loops'; try 'default'"
            )

    @property
    def flags(self) -> dict[str, str]:
        """Flags of XLA by name; none for the defaults."""
        found = {}
        if self.collectives_in_flight > 1:
            found[OVERLAP] = str(self.collectives_in_flight)
        if self.command_buffers != "default":
            found[COMMANDS] = {"off": "", "loops": "+CONDITIONAL,+WHILE"}[self.command_buffers]
        return found


def set_gpu_options(options: GpuOptions, environment: MutableMapping[str, str] = os.environ) -> str:
    """Sets the options for this process, before JAX's devices are touched. Call it once; on CPUs it does nothing.

    What the environment says already stays as it is.

    Args:
        options: What to set.
        environment: Where to set it.

    Returns:
        What is in force, in one line for people; empty on CPUs.

    Raises:
        ConfigError: The environment has a flag that breaks pipelines or another value for an option that is no default;
            or JAX's devices are in use already, so that an option that is no default would come too late.

    Example:
        >>> line = set_gpu_options(GpuOptions(memory_fraction=0.8))
    """
    if not _has_gpus():
        return ""
    given = _flags_of(environment.get(FLAGS, ""))
    _refuse(given)
    for name, value in options.flags.items():
        if given.get(name, value) != value:
            raise ConfigError(f"XLA_FLAGS has {name}={given[name]}, but [gpu] asks for {value!r}; try one of the two")
    default = GpuOptions()
    if devices_are_in_use():
        if options.flags or options.memory_fraction != default.memory_fraction:
            raise ConfigError("[gpu] must be set before JAX starts, and it already runs; try a new process")
        return "as JAX was started"
    new = {name: value for name, value in options.flags.items() if name not in given}
    if new:
        words = [environment.get(FLAGS, ""), *(f"{name}={value}" for name, value in new.items())]
        environment[FLAGS] = " ".join(word for word in words if word)
    memory = next((environment[name] for name in (MEMORY, OLD_MEMORY) if environment.get(name)), None)
    if memory is None:
        memory = environment[MEMORY] = str(options.memory_fraction)
    return _describe(options, memory, environment)


def _describe(options: GpuOptions, memory: str, environment: MutableMapping[str, str]) -> str:
    flags = _flags_of(environment.get(FLAGS, ""))
    in_flight = flags.get(OVERLAP, "1")
    parts = [
        f"memory fraction {memory}",
        f"{in_flight} collective{'s' if in_flight != '1' else ''} in flight",
        f"command buffers {options.command_buffers}",
    ]
    if options.second_stream:
        parts.append("second stream")
    others = [f"{name}={value}" for name, value in flags.items() if name not in (OVERLAP, COMMANDS)]
    return ", ".join(parts) + (f"; from XLA_FLAGS {' '.join(others)}" if others else "")


def _refuse(flags: dict[str, str]) -> None:
    for name, (why, harmless) in FORBIDDEN.items():
        if name in flags and flags[name] not in harmless:
            raise ConfigError(f"XLA_FLAGS has {name}={flags[name]}, which {why}; try without it")


def _flags_of(text: str) -> dict[str, str]:
    """Flags by name; a later one wins, as for XLA.

    Example:
        >>> _flags_of("--a=1 --b --a=2")
        {'--a': '2', '--b': 'true'}
    """
    found = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        found[name] = value if equals else "true"
    return found


def _has_gpus() -> bool:
    """Whether JAX would use GPUs, as far as can be said without starting it."""
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    wanted = not platforms or not {"gpu", "cuda"}.isdisjoint(platforms.split(","))
    return wanted and any(importlib.util.find_spec(plugin) for plugin in PLUGINS)
