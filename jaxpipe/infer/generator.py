"""The door to generation: a model on a mesh that continues prompts, all in one XLA program."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxpipe.documents import shown
from jaxpipe.errors import ConfigError
from jaxpipe.infer.loop.books import empty_books
from jaxpipe.infer.loop.program import Programs
from jaxpipe.infer.loop.ring import Ring
from jaxpipe.infer.model import decoder_of
from jaxpipe.infer.sampling import Sampling
from jaxpipe.infer.weights import weights_of
from jaxpipe.models.encdec_config import EncDecConfig
from jaxpipe.models.gpt_config import GPTConfig
from jaxpipe.runtime.layout.mesh import PIPE, batch_shards, check_axes, make_mesh, on_cpu
from jaxpipe.runtime.layout.tree import Tree

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Completion:
    """What a model wrote.

    Attributes:
        tokens: Without the prompt; a stop token is the last one.
        logprobs: Of each token, see `Sampling`; None if they were not asked for.
        finish_reason: ``stop`` after a stop token, ``length`` at `max_new_tokens`.
    """

    tokens: list[int]
    logprobs: list[float] | None
    finish_reason: Finish


@dataclass(frozen=True)
class Generated:
    """What one run of the ring did.

    Attributes:
        completions: In the order of the prompts.
        ticks: Ticks of the loop.
        positions: Places in the ring, ``devices * ticks`` over all data shards.
        empty_positions: Those in which a device had nothing to do: while the ring fills, before the last prompt's
            first token, and after the last sequences' end. None in between, while every group has a sequence.
    """

    completions: list[Completion] = field(repr=False)
    ticks: int
    positions: int
    empty_positions: int


class Generator:
    """A model that generates, on a mesh.

    Args:
        cfg: The model.
        canonical: Its parameters: the canonical tree, arrays on the mesh or on the host.
        mesh: From `jaxpipe.make_mesh`; by default one device. Data shards (`data`, `fsdp`) have slots of their own.
        repeats: V, stages of each device.
        groups: G, groups that go round the ring, at least P; by default P. With more than P a token takes longer and
            no more come out.
        rows: Sequences of a group. The model runs for groups * rows sequences per data shard at a time.
        max_len: Tokens of prompt and answer together, at most: the room in the caches.
        chunk: Tokens of a prompt that the model is given at a time.
        cache_dtype: Of keys and values, such as ``"bfloat16"``; by default the compute dtype.
        stages: Blocks per stage; by default those that make the slowest stage fastest, see `weights_of`.
        max_source_len: Tokens of a source at most, for an encoder-decoder; by default `max_len`.
        kernel_first: Whether linear maps of few rows are computed as `jaxpipe.infer.few_rows` does; by default on CPUs.

    Attributes:
        slots: Sequences at a time, of all data shards.

    Raises:
        ConfigError: An option out of range.
        PartitionError: The canonical tree is not the model's, or `stages` does not fit.

    Example:
        >>> from dataclasses import replace
        >>> from jaxpipe.models.gpt import PRESETS
        >>> from jaxpipe.models.build import gpt_model
        >>> from jaxpipe.runtime.sequential import sequential
        >>> cfg = replace(PRESETS["tiny"], num_layers=2, d_model=16)
        >>> batch = {name: jnp.zeros((1, 8), int) for name in ("tokens", "targets")}
        >>> canonical = sequential(gpt_model(cfg)).init(jax.random.key(0), batch)
        >>> gen = Generator(cfg, canonical, mesh=make_mesh(pipe=2), rows=2, max_len=16, chunk=4)
        >>> [len(c.tokens) for c in gen.generate([[1, 2, 3], [4]], Sampling(max_new_tokens=5))]
        [5, 5]
    """

    def __init__(
        self,
        cfg: GPTConfig | EncDecConfig,
        canonical: Tree,
        *,
        mesh: Mesh | None = None,
        repeats: int = 1,
        groups: int | None = None,
        rows: int = 8,
        max_len: int | None = None,
        chunk: int = 64,
        cache_dtype: Any = None,
        stages: Sequence[int] | str | None = None,
        max_source_len: int | None = None,
        kernel_first: bool | None = None,
    ):
        mesh = mesh or make_mesh()
        check_axes(mesh)
        kernel_first = on_cpu(mesh) if kernel_first is None else kernel_first
        decoder = decoder_of(cfg, kernel_first=kernel_first)
        max_len = max_len or decoder.longest or 1024
        devices = mesh.shape[PIPE]
        for name, value, least in (
            ("repeats", repeats, 1),
            ("groups", devices if groups is None else groups, devices),
            ("rows", rows, 1),
            ("max_len", max_len, 2),
            ("chunk", chunk, 1),
            ("max_source_len", 1 if max_source_len is None else max_source_len, 1),
        ):
            if not isinstance(value, int) or value < least:
                why = ", mesh.pipe" if name == "groups" else ""
                raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}{why}; try {least}")
        if decoder.longest is not None and max_len > decoder.longest:
            longest = decoder.longest
            raise ConfigError(f"max_len={max_len} must not exceed the model's max_seq_len={longest}; try {longest}")
        if max_source_len is not None and decoder.encoder is None:
            raise ConfigError(f"max_source_len={max_source_len} is for models with an encoder; leave it out")
        chunk = min(chunk, max_len) if decoder.encoder is None else 1
        weights = weights_of(decoder, canonical, mesh, repeats, stages, turned=kernel_first)
        self.cfg, self.mesh, self.max_len = cfg, mesh, max_len
        self.max_source_len = (max_source_len or max_len) if decoder.encoder else 0
        self.ring = Ring(
            weights=weights,
            groups=groups or devices,
            rows=rows,
            length=-(-max_len // chunk) * chunk,
            chunk=chunk,
            source_len=self.max_source_len,
            cache_dtype=jnp.dtype(cache_dtype or decoder.dtype),
            loops=on_cpu(mesh),
        )
        self.params = weights.place(canonical)
        self.programs = Programs(self.ring, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.params))

    @property
    def slots(self) -> int:
        """Sequences at a time."""
        return self.ring.slots * batch_shards(self.mesh)

    @cached_property
    def cache_bytes(self) -> int:
        """Bytes of keys and values per device: rooms * V * slots * positions * 2 * width, over `tensor` if that divides
        their heads.
        """
        rooms = jax.tree.leaves(self.ring.shapes["rooms"])
        return sum(
            math.prod(NamedSharding(self.mesh, self.ring.over_tensor(leaf)).shard_shape(leaf.shape))
            * leaf.dtype.itemsize
            for leaf in rooms
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        n: int = 1,
        decoder_prompts: Sequence[Sequence[int]] | None = None,
    ) -> list[Completion]:
        """Continues prompts. More than there are slots for are run one batch after the other.

        Args:
            prompts: Token ids, at least one each. For an encoder-decoder the sources.
            sampling: For all, or one each; by default greedy.
            n: Sequences per prompt, next to each other in the answer; each is run through the model on its own.
            decoder_prompts: For an encoder-decoder, what the answers start with; by default token 0, as T5's do.

        Raises:
            ConfigError: A prompt that is empty, too long, or holds what is no token; an option that does not fit.
        """
        found: list[Completion] = []
        for request in _batches(self._requests(prompts, sampling, n, decoder_prompts), self.slots):
            found += self.run(request).completions
        return found

    def run(self, requests: "Sequence[Row]") -> Generated:
        """One run of the ring, for no more sequences than there are slots."""
        books, sources = self.books(requests)
        out = jax.device_get(self.programs.generate(self.params, books, sources))
        first = {
            name: out[name][0].reshape(self.slots, *out[name].shape[3:]) for name in ("tokens", "logprobs", "count")
        }
        completions = []
        for n, request in enumerate(requests):
            at = self.slot_of(n)
            span = slice(len(request.tokens), len(request.tokens) + int(first["count"][at]))
            completions.append(
                completion(request.sampling, first["tokens"][at, span].tolist(), first["logprobs"][at, span].tolist())
            )
        ticks = int(out["ticks"].max())
        return Generated(completions, ticks, int(out["ticks"].sum()), int(out["empty"].sum()))

    def slot_of(self, number: int) -> int:
        """Sequences are dealt to the shards, and in each to its groups, in turn: none is left with less to do."""
        shards, ring = batch_shards(self.mesh), self.ring
        shard, within = number % shards, number // shards
        return shard * ring.slots + (within % ring.groups) * ring.rows + within // ring.groups

    def books(self, requests: "Sequence[Row]") -> tuple[Tree, Tree]:
        """The books at the start, and the sources, leaves [shards, N, ...]."""
        ring, shards = self.ring, batch_shards(self.mesh)
        shapes = empty_books(self.slots, ring.length)
        books = {name: np.zeros(s.shape, s.dtype) for name, s in shapes.items()}
        books["position"] -= 1
        sources = {
            "tokens": np.zeros((self.slots, self.max_source_len), np.int32),
            "length": np.zeros(self.slots, np.int32),
        }
        for n, request in enumerate(requests):
            at = self.slot_of(n)
            for name, value in self.row(request, n).items():
                books[name][at] = value
            books["live"][at] = True
            for name, value in self.source(request).items():
                sources[name][at] = value

        def cut(array):
            return array.reshape(shards, ring.slots, *array.shape[1:])

        return jax.tree.map(cut, books), jax.tree.map(cut, sources)

    def row(self, request: "Row", ticket: int) -> dict[str, np.ndarray]:
        """What the books hold of a request, see `books.admit`."""
        tokens = np.zeros(self.ring.length, np.int32)
        tokens[: len(request.tokens)] = request.tokens
        known = {"tokens": tokens, "length": np.int32(len(request.tokens)), "ticket": np.int32(ticket)}
        return {**request.sampling.row(request.number), **known}

    def source(self, request: "Row") -> dict[str, np.ndarray]:
        """A request's source in the ring's form."""
        tokens = np.zeros(self.max_source_len, np.int32)
        tokens[: len(request.source)] = request.source
        return {"tokens": tokens, "length": np.asarray(len(request.source), np.int32)}

    def check(self, prompt: Sequence[int], sampling: Sampling, decoder_prompt: Sequence[int] = (0,)) -> "Row":
        """A request that fits, or a ConfigError."""
        vocab_size = self.ring.decoder.vocab_size
        source: Sequence[int] = ()
        if self.ring.decoder.encoder is not None:
            source, prompt = prompt, decoder_prompt
            self._check_tokens("prompt", source, self.max_source_len, "max_source_len")
        self._check_tokens("prompt", prompt, self.max_len - 1, "max_len - 1")
        if len(prompt) + sampling.max_new_tokens > self.max_len:
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens and max_new_tokens={sampling.max_new_tokens} exceed "
                f"max_len={self.max_len}; try max_new_tokens={self.max_len - len(prompt)}"
            )
        for stop in sampling.stop_token_ids:
            if stop >= vocab_size:
                raise ConfigError(
                    f"stop_token_ids has {stop} but the vocabulary has {vocab_size} tokens; try below that"
                )
        return Row(tuple(prompt), sampling, 0, tuple(source))

    def _check_tokens(self, name: str, tokens: Sequence[int], most: int, rule: str) -> None:
        vocab_size = self.ring.decoder.vocab_size
        if not isinstance(tokens, Sequence | np.ndarray) or isinstance(tokens, str | bytes):
            raise ConfigError(f"a {name} is {shown(tokens)}, which is no list of token ids; try [0]")
        if not 1 <= len(tokens) <= most:
            raise ConfigError(f"a {name} has {len(tokens)} tokens but must have 1 to {rule}={most}; try {most}")
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int | np.integer) or not 0 <= token < vocab_size:
                raise ConfigError(f"a {name} holds {shown(token)}, which is no token id below {vocab_size}; try 0")

    def _requests(self, prompts, sampling, n: int, decoder_prompts) -> "list[Row]":
        each = (
            [sampling or Sampling()] * len(prompts) if sampling is None or isinstance(sampling, Sampling) else sampling
        )
        starts = [(0,)] * len(prompts) if decoder_prompts is None else decoder_prompts
        for name, values in (("sampling", each), ("decoder_prompts", starts)):
            if len(values) != len(prompts):
                raise ConfigError(f"{name} has {len(values)} entries for {len(prompts)} prompts; try one each")
        if decoder_prompts is not None and self.ring.decoder.encoder is None:
            raise ConfigError("decoder_prompts is for models with an encoder; leave it out")
        if not isinstance(n, int) or n < 1:
            raise ConfigError(f"n={n!r} must be a whole number of at least 1; try 1")
        rows = [self.check(*each) for each in zip(prompts, each, starts, strict=True)]
        return [Row(row.tokens, row.sampling, number, row.source) for row in rows for number in range(n)]


@dataclass(frozen=True)
class Row:
    """One sequence that is to be written.

    Attributes:
        tokens: The prompt, or what the decoder starts with.
        sampling: How it is continued.
        number: Which of several of one prompt.
        source: For an encoder-decoder.
    """

    tokens: tuple[int, ...]
    sampling: Sampling
    number: int = 0
    source: tuple[int, ...] = ()


def completion(sampling: Sampling, tokens: list[int], logprobs: list[float]) -> Completion:
    """A finished sequence."""
    stopped = bool(tokens) and tokens[-1] in sampling.stop_token_ids
    return Completion(tokens, logprobs if sampling.logprobs else None, "stop" if stopped else "length")


def generate(
    cfg: GPTConfig | EncDecConfig,
    canonical: Tree,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None = None,
    *,
    mesh: Mesh | None = None,
    n: int = 1,
    **options: Any,
) -> list[Completion]:
    """Continues prompts with a model, once: `Generator` and its `generate` in one.

    Args:
        cfg: The model.
        canonical: Its parameters.
        prompts: Token ids.
        sampling: For all, or one each.
        mesh: Where to run.
        n: Sequences per prompt.
        options: Of `Generator`.
    """
    return Generator(cfg, canonical, mesh=mesh, **options).generate(prompts, sampling, n=n)


def _batches(rows: list, size: int) -> list[list]:
    return [rows[at : at + size] for at in range(0, len(rows), size)]
