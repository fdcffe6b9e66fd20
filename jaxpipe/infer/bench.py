"""How fast tokens come, on simulated CPU devices, against the same model without a pipeline on one core.

Four things are timed in turn, round after round, all greedy, with the same number of sequences:

    ring     P devices, P groups
    one      one device and one group, in a process pinned to one core: the unpipelined decode
    plain    the same with matrix products as XLA makes them, without `jaxpipe.infer.few_rows`
    groups   one device and P groups, in that process: what cutting the batch into groups costs by itself

Each is timed for one new token and for all: the difference is decoding alone, the first the prompts. Reported are
medians over the rounds and their ratios.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxpipe.errors import ConfigError
from jaxpipe.infer.generator import Generator
from jaxpipe.infer.sampling import Sampling
from jaxpipe.measure.bench import OneCore
from jaxpipe.models.build import gpt_model
from jaxpipe.models.gpt_config import GPTConfig
from jaxpipe.runtime.layout.mesh import make_mesh
from jaxpipe.runtime.layout.tree import Tree
from jaxpipe.runtime.sequential import sequential


@dataclass(frozen=True)
class Work:
    """What is generated.

    Attributes:
        config: The model; its weights are random.
        sequences: At a time.
        prompt_len: Tokens of each prompt, given to the model in one chunk.
        new_tokens: Tokens of each answer, at least 2.
        repeats: V of the ring.
    """

    config: GPTConfig
    sequences: int
    prompt_len: int
    new_tokens: int
    repeats: int = 1

    def __post_init__(self):
        for name, least in (("sequences", 1), ("prompt_len", 1), ("new_tokens", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}; try {least}")

    def generator(self, devices: int, groups: int, kernel_first: bool = True) -> Generator:
        """The model on the first devices, its sequences in so many groups.

        Args:
            devices: P.
            groups: G.
            kernel_first: See `Generator`.

        Raises:
            ConfigError: The groups do not divide the sequences.
        """
        if self.sequences % groups:
            near = max(groups, self.sequences // groups * groups)
            raise ConfigError(f"{self.sequences} sequences must be a multiple of devices={groups}; try {near}")
        return Generator(
            self.config,
            random_weights(self.config),
            mesh=make_mesh(pipe=devices),
            repeats=self.repeats if devices > 1 else 1,
            groups=groups,
            rows=self.sequences // groups,
            max_len=self.prompt_len + self.new_tokens,
            chunk=self.prompt_len,
            kernel_first=kernel_first,
        )

    def seconds(self, gen: Generator, new_tokens: int) -> float:
        """Times one run."""
        rng = np.random.default_rng(0)
        prompts = rng.integers(0, self.config.vocab_size, (self.sequences, self.prompt_len)).tolist()
        rows = [gen.check(prompt, Sampling(max_new_tokens=new_tokens)) for prompt in prompts]
        start = time.perf_counter()
        gen.run(rows)
        return time.perf_counter() - start


@dataclass(frozen=True)
class Speed:
    """Medians, seconds.

    Attributes:
        prompts_s: Until every sequence has its first token.
        decode_s: For all the others.
        tokens: How many these are.
    """

    prompts_s: float
    decode_s: float
    tokens: int

    @property
    def tokens_per_s(self) -> float:
        """While decoding."""
        return self.tokens / self.decode_s


@dataclass(frozen=True)
class Row:
    """One line: the ring of P devices and what it is compared with.

    Attributes:
        P: Devices.
        stages: Blocks per stage.
        ring: Of P devices.
        one: One group on one core.
        plain: The same with plain products.
        groups: P groups on one core.
        cache_bytes: Of keys and values, per device of the ring.
        period_ms: Between two tokens of a sequence in the ring.
    """

    P: int
    stages: tuple[int, ...]
    ring: Speed
    one: Speed
    plain: Speed
    groups: Speed
    cache_bytes: int
    period_ms: float

    @property
    def speedup(self) -> float:
        """The ring's tokens per second over those of one core."""
        return self.ring.tokens_per_s / self.one.tokens_per_s

    @property
    def over_plain(self) -> float:
        """The ring's tokens per second over those of one core with plain products."""
        return self.ring.tokens_per_s / self.plain.tokens_per_s

    @property
    def over_groups(self) -> float:
        """The ring's tokens per second over those of as many groups on one core."""
        return self.ring.tokens_per_s / self.groups.tokens_per_s


def measure(work: Work, devices: int, single: OneCore, rounds: int) -> Row:
    """Times one ring.

    Args:
        work: What is generated.
        devices: P.
        single: Of `timed_decode`.
        rounds: How often each thing is timed, after one run to warm up.
    """
    gen = work.generator(devices, devices)
    times: dict[tuple[str, int], list[float]] = {}
    for warm in range(rounds + 1):
        for new in (1, work.new_tokens):
            found = {
                "one": single.seconds(1, new),
                "plain": single.seconds(1, new, False),
                "groups": single.seconds(devices, new),
                "ring": work.seconds(gen, new),
            }
            for name, seconds in found.items() if warm else ():
                times.setdefault((name, new), []).append(seconds)
    speeds = {}
    for name in ("ring", "one", "plain", "groups"):
        first, whole = (statistics.median(times[name, new]) for new in (1, work.new_tokens))
        speeds[name] = Speed(first, whole - first, work.sequences * (work.new_tokens - 1))
    period_ms = 1e3 * speeds["ring"].decode_s / (work.new_tokens - 1)
    return Row(devices, gen.ring.layout.counts, **speeds, cache_bytes=gen.cache_bytes, period_ms=period_ms)


def head(work: Work, cores: int) -> str:
    """What stands above the lines."""
    c = work.config
    return (
        f"gpt d={c.d_model} L={c.num_layers} vocabulary {c.vocab_size}, {c.dtype}, {work.sequences} sequences, "
        f"prompts of {work.prompt_len}, {work.new_tokens} new tokens; ring on {cores} cores, the rest on one; medians\n"
        f"{'P':>2} {'stages':>12} {'one tok/s':>10} {'plain tok/s':>11} {'groups tok/s':>12} {'ring tok/s':>10} "
        f"{'ring/one':>8} {'ring/plain':>10} {'ring/groups':>11} {'ms/token':>8} {'prompts s, one':>14} {'ring':>6} "
        f"{'cache MB':>8}"
    )


def line(row: Row) -> str:
    """One ring."""
    return (
        f"{row.P:2} {','.join(map(str, row.stages)):>12} {row.one.tokens_per_s:10.1f} "
        f"{row.plain.tokens_per_s:11.1f} {row.groups.tokens_per_s:12.1f} {row.ring.tokens_per_s:10.1f} "
        f"{row.speedup:8.2f} {row.over_plain:10.2f} {row.over_groups:11.2f} {row.period_ms:8.1f} "
        f"{row.one.prompts_s:14.2f} {row.ring.prompts_s:6.2f} {row.cache_bytes / 1e6:8.1f}"
    )


def numbers(row: Row) -> dict[str, Any]:
    """A row as plain values."""
    plain = {name: vars(getattr(row, name)) for name in ("ring", "one", "plain", "groups")}
    ratios = {"speedup": row.speedup, "over_plain": row.over_plain, "over_groups": row.over_groups}
    return {**vars(row), "stages": list(row.stages), **plain, **ratios}


def random_weights(config: GPTConfig) -> Tree:
    """A canonical tree of random numbers, made on the host."""
    batch = {name: jax.ShapeDtypeStruct((1, 2), np.int32) for name in ("tokens", "targets")}
    shapes = jax.eval_shape(sequential(gpt_model(config)).init, jax.random.key(0), batch)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: (0.02 * rng.standard_normal(s.shape, np.float32)).astype(s.dtype), shapes)


def timed_decode(work: Work) -> Callable[..., float]:
    """For `OneCore`: one run on one device, with so many groups and new tokens, and whether kernels come first."""
    made: dict[tuple[int, bool], Generator] = {}

    def seconds(groups: int, new_tokens: int, kernel_first: bool = True) -> float:
        key = groups, kernel_first
        if key not in made:
            made[key] = work.generator(1, *key)
        return work.seconds(made[key], new_tokens)

    return seconds
