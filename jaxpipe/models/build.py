"""Where the reference models meet the pipeline: a configuration becomes a model that a pipeline can run.

The loss is here because it belongs to training, not to the model: a GPT's batch is ``{"tokens", "targets"}``, integers
[B, T], and an optional ``"mask"`` [B, T] of bools or weights. A target of -100 counts nothing.

Shape legend: B rows, T positions, V vocabulary, L layers.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxpipe.flax_nnx import nnx
from jaxpipe.models import encdec, gpt
from jaxpipe.models.encdec_config import EncDecConfig
from jaxpipe.models.gpt import GPTConfig
from jaxpipe.nn import nnx_model, vocab_embed, vocab_head
from jaxpipe.ops.products import vocab_logits
from jaxpipe.runtime.layout.tree import Tree, tie
from jaxpipe.runtime.model import Model, carry_and_aux


def gpt_model(cfg: GPTConfig) -> Model:
    """A GPT for `Pipeline` and `sequential`, with the next-token loss.

    Args:
        cfg: The model. With ``tied=True`` the head's kernel lives in the embedding. With experts the blocks are of
            the kinds ``dense`` and ``moe``, and the loss has the auxiliary losses in it.

    Example:
        >>> from jaxpipe.models.gpt import PRESETS
        >>> model = gpt_model(PRESETS["tiny"])
        >>> len(model.blocks), model.tie
        (4, {'head/kernel': 'embed/table'})
    """
    model = nnx_model(
        embed=vocab_embed(
            lambda rngs: gpt.Embed(cfg, rngs=rngs),
            table="table",
            tokens=lambda mb: mb["tokens"],
            finish=lambda module, rows, mb: module.finish(rows),
        ),
        block={kind: partial(_gpt_block, kind, cfg) for kind in dict.fromkeys(cfg.kinds)},
        layers=cfg.kinds,
        head=vocab_head(
            lambda rngs: gpt.Head(cfg, rngs=rngs),
            kernel="kernel",
            features=lambda module, carry, mb: module.features(carry),
            targets=targets,
        ),
        tie={"head/kernel": "embed/table"} if cfg.tied else {},
        carry_spec=PartitionSpec(None, "tensor") if cfg.sequence_parallel else None,
        divisible_by_tensor=_divisible(cfg),
    )
    return replace(model, batch={"tokens": True, "targets": True, "mask": False})


def encdec_model(cfg: EncDecConfig) -> Model:
    """An encoder-decoder for `Pipeline` and `sequential`, with the next-token loss on the decoder's side.

    A batch is ``{"encoder_tokens" [B, S], "tokens" [B, T], "targets" [B, T]}``, where `tokens` are the decoder's
    inputs; optionally ``"encoder_mask"`` [B, S], False at padding, and ``"mask"`` [B, T] as for a GPT.

    Args:
        cfg: The model. What its blocks share lives in the embedding, see `Model.tie`.

    Example:
        >>> from jaxpipe.models.encdec import PRESETS
        >>> [block.kind for block in encdec_model(PRESETS["tiny"]).blocks]
        ['encoder', 'encoder', 'decoder', 'decoder']
    """
    model = nnx_model(
        embed=vocab_embed(
            lambda rngs: encdec.Embed(cfg, rngs=rngs),
            table="table",
            tokens=lambda mb: (mb["encoder_tokens"], mb["tokens"]),
            finish=lambda module, rows, mb: module.finish(rows),
        ),
        block={
            "encoder": lambda rngs: encdec.EncoderBlock(cfg, rngs=rngs),
            "decoder": lambda rngs: encdec.DecoderBlock(cfg, rngs=rngs),
        },
        layers=cfg.kinds,
        head=vocab_head(
            lambda rngs: encdec.Head(cfg, rngs=rngs),
            kernel="kernel",
            features=lambda module, carry, mb: module.features(carry),
            targets=targets,
        ),
        tie=encdec.shared(cfg),
        block_call=lambda module, carry, mb: module(carry, mb.get("encoder_mask")),
        divisible_by_tensor={"num_heads": cfg.num_heads, "d_ff": cfg.d_ff},
    )
    needed = dict.fromkeys(("encoder_tokens", "tokens", "targets"), True)
    return replace(model, batch=needed | {"encoder_mask": False, "mask": False})


def gpt_logits(cfg: GPTConfig, canonical: Tree, tokens_BT) -> jax.Array:
    """The logits of a GPT with no pipeline and no dropout, for sampling and for looking inside.

    Args:
        cfg: The model.
        canonical: ``{"embed", "blocks": {kind: leaves [L_kind, ...]}, "head"}``; a tied head has no kernel.
        tokens_BT: Integers in [0, V).

    Returns:
        [B, T, V], float32 (float64 for a float64 model).
    """
    model = gpt_model(cfg)
    x_BTD = model.embed.apply(canonical["embed"], {"tokens": tokens_BT}, None)

    for block, first, last in _runs(model):
        layers = jax.tree.map(lambda leaf, at=slice(first, last): leaf[at], canonical["blocks"][block.kind])

        def one_layer(x_BTD, params, block=block):
            return carry_and_aux(x_BTD, block.apply(params, x_BTD, {}, None))[0], None

        x_BTD, _ = jax.lax.scan(one_layer, x_BTD, layers)
    head = tie(canonical["head"], canonical["embed"], model.head_tie)
    features_BTD = model.head_loss.features(head, x_BTD, {}, None)
    return vocab_logits(head["kernel"], features_BTD)


def targets(mb: Tree) -> tuple[Any, Any]:
    """The targets [B, T] of a row group and what each counts: the mask, if there is one."""
    if "mask" in mb:
        return mb["targets"], mb["mask"]
    return mb["targets"], jnp.ones(mb["targets"].shape, jnp.float32)


def _divisible(cfg: GPTConfig) -> dict[str, int]:
    """What `tensor` must divide; heads of keys and values it need not, if it divides the columns of `qkv`."""
    numbers = {"num_heads": cfg.num_heads, "d_ff": cfg.hidden_dim}
    if cfg.kv_heads < cfg.num_heads:
        numbers["(num_heads+2*num_kv_heads)*head_width"] = (cfg.num_heads + 2 * cfg.kv_heads) * cfg.head_dim
    return numbers


def _gpt_block(kind: str, cfg: GPTConfig, rngs: nnx.Rngs) -> nnx.Module:
    return gpt.BLOCKS[kind](cfg, rngs=rngs)


def _runs(model: Model) -> Iterator[tuple[Any, int, int]]:
    """The blocks as runs of one kind: a block, and the first and one past the last of the run among its kind."""
    seen: Counter[str] = Counter()
    for kind, run in groupby(model.blocks, key=lambda block: block.kind):
        block, *others = run
        first = seen[kind]
        seen[kind] += 1 + len(others)
        yield block, first, seen[kind]
