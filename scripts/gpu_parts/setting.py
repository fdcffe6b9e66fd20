"""What a part is told, and what all parts do alike: compile, count bytes, time, report."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpipe as jp
from gpu_parts.report import Row
from jaxpipe.errors import ConfigError
from jaxpipe.jax_internals import jaxlib_version
from jaxpipe.plan import find_device

MEMORY_ASKED = 75e9
"""Bytes that a program may need on a GPU of 80 GB, where it is only compiled."""


@dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        run: The program.
        compile_s: How long tracing and compiling took.
        temporary: Bytes that it needs beside arguments and results.
        outputs: Bytes of its results.
        peak: Bytes that it needs in all.
    """

    run: Any
    compile_s: float
    temporary: int
    outputs: int
    peak: int


@dataclass(frozen=True)
class Times:
    """Seconds of some runs.

    Attributes:
        median: Of all.
        least: The fastest.
        most: The slowest.
        rounds: How many there were.
    """

    median: float
    least: float
    most: float
    rounds: int

    def __str__(self):
        return f"{1e3 * self.median:.4g} ms ({1e3 * self.least:.4g} to {1e3 * self.most:.4g})"

    def numbers(self) -> dict[str, float]:
        """As plain values."""
        return {"median_s": self.median, "min_s": self.least, "max_s": self.most, "rounds": self.rounds}


@dataclass(frozen=True)
class Setting:
    """How a part runs.

    Attributes:
        part: Its name.
        quick: Toy sizes, on the CPU.
        compile_only: For an H100 that is not there; nothing runs.
        deadline: When it should have ended, by `time.monotonic`.
        rows: The file that rows are added to.
    """

    part: str
    quick: bool
    compile_only: bool
    deadline: float
    rows: Path

    def row(
        self, what: str, found: str, asked: str = "", held: bool | None = None, numbers: dict[str, Any] | None = None
    ) -> None:
        """Reports a row at once, so that it stays if the part ends early; see `Row`."""
        with self.rows.open("a") as file:
            print(Row(self.part, what, found, asked, held, numbers or {}).line(), file=file, flush=True)

    def ask(self, what: str, found: str, asked: str, held: bool, numbers: dict[str, Any] | None = None) -> None:
        """Reports a row with something asked of a GPU; toy sizes on a CPU say nothing about it."""
        if self.quick:
            self.row(what, found, numbers=numbers)
        else:
            self.row(what, found, asked, held, numbers)

    @property
    def fused(self) -> bool:
        """Whether attention is the fused kernel of NVIDIA GPUs."""
        return not self.quick

    @property
    def compiler_options(self) -> Any:
        """XLA's own, whatever the environment says where nothing is timed; toys compile longer than they run."""
        if self.quick or self.compile_only:
            return {"xla_backend_optimization_level": 0 if self.quick else 3}
        return None

    def devices(self, count: int = 1) -> list[Any]:
        """The devices to compile for."""
        if not self.compile_only:
            return jax.devices()[:count]
        from gpu_parts.absent import h100s

        return h100s(count)

    def mesh(self) -> jax.sharding.Mesh:
        """One device."""
        return jp.make_mesh(devices=self.devices())

    def compile(self, function: Callable, *shapes: Any) -> Program:
        """Compiles a function for shapes that say where they lie."""
        start = time.perf_counter()
        compiled = jax.jit(function).lower(*shapes).compile(self.compiler_options)
        memory: Any = compiled.memory_analysis()
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return Program(
            run=compiled,
            compile_s=time.perf_counter() - start,
            temporary=memory.temp_size_in_bytes,
            outputs=outputs,
            peak=memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes,
        )

    def fits(self, what: str, program: Program) -> bool:
        """Whether a program can be run here, reported where it cannot, or where nothing is run."""
        if self.compile_only:
            held = program.peak < MEMORY_ASKED
            numbers = {"peak_bytes": program.peak, "temporary_bytes": program.temporary}
            found = f"{program.peak / 1e9:.1f} GB, {program.temporary / 1e9:.1f} of them temporary"
            found += f"; {program.compile_s:.0f} s"
            self.row(f"{what} compiles", found, f"below {MEMORY_ASKED / 1e9:.0f} GB", held, numbers)
            return False
        limit = memory_stats().get("bytes_limit")
        if limit and program.peak > limit:
            self.row(what, f"needs {program.peak / 1e9:.1f} GB, here are {limit / 1e9:.1f}", "fits", False)
            return False
        return True

    def timed(self, runs: Mapping[str, Callable[[], Any]], rounds: int, share: float = 1.0) -> dict[str, Times]:
        """Times some things in turn, round after round, after one run of each to warm up.

        Args:
            runs: What to time, by name.
            rounds: How often at most; at least twice.
            share: Of the time that is left, how much this may take.
        """
        until = time.monotonic() + share * max(self.deadline - time.monotonic(), 0.0)
        found: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            jax.block_until_ready(run())
        for number in range(2 if self.quick else rounds):
            if number >= 2 and time.monotonic() > until:
                break
            for name, run in runs.items():
                start = time.perf_counter()
                jax.block_until_ready(run())
                found[name].append(time.perf_counter() - start)
        return {name: Times(statistics.median(s), min(s), max(s), len(s)) for name, s in found.items()}


def failed(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def sees_gpu() -> bool:
    """Whether JAX runs on a GPU."""
    return jax.default_backend() == "gpu"


def facts(setting: Setting) -> dict[str, str]:
    """What a part runs on."""
    device = jax.devices()[0]
    card = "CPU, toy sizes" if setting.quick else device.device_kind
    return {
        "card": "none, compiled for an H100" if setting.compile_only else card,
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        "jaxlib": ".".join(map(str, jaxlib_version())),
        "backend": " ".join(device.client.platform_version.split()),
        "python": platform.python_version(),
        "jaxpipe": jp.__version__,
    }


def peak_flops() -> float | None:
    """Operations per second of the present device in bfloat16 by its data sheet; None where that is not known."""
    kind = jax.devices()[0].device_kind
    if "pcie" in kind.lower() or "nvl" in kind.lower():
        return None  # slower than the SXM cards of that name
    try:
        return find_device(kind).peak_flops["bfloat16"]
    except ConfigError:
        return None


def memory_stats() -> dict[str, int]:
    """What the present device says of its memory; empty on CPUs."""
    return jax.local_devices()[0].memory_stats() or {}


def filled(shape: jax.ShapeDtypeStruct, seed: int = 0) -> np.ndarray:
    """An array of small random numbers on the host, or of token ids below 256: a short run of them over and over."""
    rng = np.random.default_rng(seed)
    if jnp.issubdtype(shape.dtype, jnp.integer):
        return rng.integers(0, 256, shape.shape).astype(shape.dtype)
    return np.resize((0.02 * rng.standard_normal(65521, np.float32)).astype(shape.dtype), shape.shape)


def relative_error(found: Any, wanted: Any) -> float:
    """The largest difference of a leaf over the largest entry of it, of all leaves; NaN where one is none."""
    return float(np.max(jax.tree.leaves(_errors(found, wanted))))


@jax.jit
def _errors(found: Any, wanted: Any) -> Any:
    """By leaf, on the device: gradients of a large vocabulary are slow to bring to the host."""

    def error(a, b):
        wide = jnp.promote_types(b.dtype, jnp.float32)
        a, b = a.astype(wide), b.astype(wide)
        return jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-30)

    return jax.tree.map(error, found, wanted)
