"""A model as decoding sees it: plain functions over the canonical tree's parts, one kind of block at a time.

Shape legend: R rows, C new tokens of each, S positions of the cache, N tokens of a source, D d_model, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.errors import ConfigError
from jaxpipe.flax_nnx import nnx
from jaxpipe.infer.few_rows import use_kernel_first
from jaxpipe.models import encdec, gpt
from jaxpipe.models.encdec_config import EncDecConfig
from jaxpipe.models.gpt_config import GPTConfig
from jaxpipe.nn.nnx_part import NNXPart
from jaxpipe.runtime.layout.rest import tensor_dims
from jaxpipe.runtime.layout.tree import Tree

Shapes = Mapping[str, jax.ShapeDtypeStruct]


@dataclass(frozen=True)
class Encoder:
    """What an encoder-decoder has beside its decoder: a source is encoded whole, once.

    Attributes:
        kinds: The kind of each block, in order.
        blocks: By kind, ``(params, x_RND, mask_RN) -> x_RND``.
        cross: By kind of a decoder block, ``(params, x_RND) -> {"cross_k", "cross_v"}``, of what the last block gives.
    """

    kinds: tuple[str, ...]
    blocks: Mapping[str, Callable[..., Any]]
    cross: Mapping[str, Callable[..., Any]]


@dataclass(frozen=True)
class Decoder:
    """What writes the next token.

    Attributes:
        kinds: The kind of each block, in order.
        embed: ``(params, tokens_RC, positions_RC) -> x_RCD``.
        steps: By kind, ``(params, x_RCD, cache, positions_RC) -> (x_RCD, new)``; see `jaxpipe.models.gpt`.
        logits: ``(params, x_RCD) -> logits_RCV``.
        cache: ``(rows, length, source_len, dtype) -> shapes`` of what a block keeps.
        ties: Leaves that live in the embedding, see `jaxpipe.runtime.model.Model`.
        tensor: The dims that lie on the mesh axis `tensor`, see `jaxpipe.runtime.layout.relayout.Layout`.
        vocab_size: V.
        d_model: D.
        dtype: Of what passes between blocks.
        longest: Positions that there are; None for any number.
        heads: Heads of queries, which `tensor` must divide.
        encoder: Of an encoder-decoder.
    """

    kinds: tuple[str, ...]
    embed: Callable[..., Any]
    steps: Mapping[str, Callable[..., Any]]
    logits: Callable[..., Any]
    cache: Callable[[int, int, int, Any], Shapes]
    ties: Mapping[str, str]
    tensor: Mapping[str, Mapping[str, int]] = field(hash=False)
    vocab_size: int
    d_model: int
    dtype: Any
    longest: int | None
    heads: int
    encoder: Encoder | None = None

    def ties_of(self, user: str) -> dict[str, str]:
        """The tied leaves of the ``head`` or of ``blocks/KIND``: from paths there to paths in the embedding."""
        pairs = ((to, source) for to, source in self.ties.items() if to.startswith(f"{user}/"))
        return {to.removeprefix(f"{user}/"): source.removeprefix("embed/") for to, source in pairs}


def decoder_of(cfg: GPTConfig | EncDecConfig, *, kernel_first: bool = False) -> Decoder:
    """The functions of a reference model.

    Args:
        cfg: Of a GPT or of an encoder-decoder.
        kernel_first: Whether linear maps of few rows are computed as `jaxpipe.infer.few_rows` does.

    Raises:
        ConfigError: Another kind of config.

    Example:
        >>> from jaxpipe.models.gpt import PRESETS
        >>> decoder_of(PRESETS["tiny"]).kinds
        ('block', 'block', 'block', 'block')
    """
    if isinstance(cfg, GPTConfig):
        return _gpt(cfg, kernel_first)
    if isinstance(cfg, EncDecConfig):
        return _encdec(cfg, kernel_first)
    raise ConfigError(f"cfg={type(cfg).__name__} has no decoding; try GPTConfig or EncDecConfig")


def _gpt(cfg: GPTConfig, kernel_first: bool) -> Decoder:
    make = partial(_make, cfg, kernel_first)
    embed = NNXPart("embed", partial(make, gpt.Embed), _step)
    blocks = {kind: NNXPart(kind, partial(make, gpt.BLOCKS[kind]), _step) for kind in dict.fromkeys(cfg.kinds)}
    head = NNXPart("head", partial(make, gpt.Head), lambda module, x: module(x))
    return Decoder(
        kinds=cfg.kinds,
        embed=_plain(embed),
        steps={kind: _plain(part) for kind, part in blocks.items()},
        logits=_plain(head),
        cache=lambda rows, length, _, dtype: gpt.cache_shape(cfg, rows, length, dtype),
        ties={"head/kernel": "embed/table"} if cfg.tied else {},
        tensor=_tensor(embed, blocks, head),
        vocab_size=cfg.vocab_size,
        d_model=cfg.d_model,
        dtype=jnp.dtype(cfg.dtype),
        longest=cfg.max_seq_len if cfg.positions == "learned" else None,
        heads=cfg.num_heads,
    )


def _encdec(cfg: EncDecConfig, kernel_first: bool) -> Decoder:
    make = partial(_make, cfg, kernel_first)
    embed = NNXPart("embed", partial(make, encdec.Embed), _step)
    step = NNXPart("decoder", partial(make, encdec.DecoderBlock), _step)
    cross = NNXPart("decoder", partial(make, encdec.DecoderBlock), lambda module, x: module.cross_cache(x))
    encode = NNXPart("encoder", partial(make, encdec.EncoderBlock), _encode)
    head = NNXPart("head", partial(make, encdec.Head), lambda module, x: module((None, x)))
    return Decoder(
        kinds=("decoder",) * cfg.num_decoder_layers,
        embed=_plain(embed),
        steps={"decoder": _plain(step)},
        logits=_plain(head),
        cache=lambda rows, length, source_len, dtype: encdec.cache_shape(cfg, rows, length, source_len, dtype),
        ties=encdec.shared(cfg),
        tensor=_tensor(embed, {"decoder": step, "encoder": encode}, head),
        vocab_size=cfg.vocab_size,
        d_model=cfg.d_model,
        dtype=jnp.dtype(cfg.dtype),
        longest=None,
        heads=cfg.num_heads,
        encoder=Encoder(
            kinds=("encoder",) * cfg.num_encoder_layers,
            blocks={"encoder": _plain(encode)},
            cross={"decoder": _plain(cross)},
        ),
    )


def _encode(module: Any, x_RND, mask_RN):
    """An encoder block on its own stream; the decoder's beside it is empty."""
    return module((x_RND, x_RND[:, :1]), mask_RN)[0]


def _make(cfg: Any, kernel_first: bool, cls: Any, rngs: nnx.Rngs) -> Any:
    module = cls(cfg, rngs=rngs)
    return use_kernel_first(module) if kernel_first else module


def _step(module: Any, *inputs: Any) -> Any:
    return module.step(*inputs)


def _plain(part: NNXPart) -> Callable[..., Any]:
    """The part's call, deterministic: ``(params, *inputs)``."""
    return lambda params, *inputs: part.apply(params, None, *inputs)


def _tensor(embed: NNXPart, blocks: Mapping[str, NNXPart], head: NNXPart) -> dict[str, Tree]:
    ends = {"embed": tensor_dims(embed.specs), "head": tensor_dims(head.specs)}
    return ends | {f"blocks/{kind}": tensor_dims(part.specs) for kind, part in blocks.items()}
