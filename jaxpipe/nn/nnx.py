"""Flax NNX modules as a pipeline's model: three factories become plain functions over plain dicts.

An NNX module is structure plus state. The structure (a graph definition) is the same for every block and is taken once,
without computing anything; the state is split into parameters, which the pipeline owns, and random streams, which are
made anew from the key of each call. There is no third kind: a pipeline runs a block many times, in an order that the
schedule decides, so a statistic or a cache that a call updates would have no defined value.

Parameters are nested dicts with string keys, named like the module's attributes: ``{"attn": {"qkv": {"kernel": …}}}``;
members of an `nnx.List` are named "0", "1", ….
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from jaxpipe.errors import ConfigError
from jaxpipe.nn.nnx_part import BlockCall, Factory, NNXPart, block_part
from jaxpipe.nn.parts import blocks_of, embed_of, head_of
from jaxpipe.runtime.layout.tree import Tree
from jaxpipe.runtime.model import Model, VocabEmbed, VocabHead


def nnx_model(
    *,
    embed: Factory | VocabEmbed,
    block: Factory | Mapping[str, Factory],
    num_layers: int | None = None,
    layers: Sequence[str] | None = None,
    head: Factory | VocabHead,
    loss: Callable[[Any, Tree], tuple] | None = None,
    tie: Mapping[str, str] | None = None,
    aux_weight: float = 1.0,
    embed_call: Callable[[Any, Tree], Tree] = lambda module, mb: module(mb),
    block_call: BlockCall | Mapping[str, BlockCall] | None = None,
    head_call: Callable[[Any, Tree, Tree], Any] = lambda module, carry, mb: module(carry),
    carry_spec: PartitionSpec | None = None,
    divisible_by_tensor: Mapping[str, int] | None = None,
) -> Model:
    """Makes a model from NNX modules.

    A module is evaluated as it was built when there is a key, and in `nnx.Module.eval` mode when there is none. Every
    random stream in it (one per `nnx.Dropout`) starts anew at each call, from the key and its place in the module.

    Where a parameter is annotated with the axis `tensor` (``nnx.with_partitioning(init, (None, "tensor"))``, or a name
    that Flax's logical axis rules map to it), it lies cut over that axis of the pipeline's mesh; all else in
    annotations is left to the pipeline.

    Args:
        embed: Factory of the embedding, or what `vocab_embed` makes.
        block: Factory of one transformer layer, whose output is like its input in structure, shapes and dtypes. Or a
            factory per kind of layer, ``{"encoder": …, "decoder": …}``.
        num_layers: Number of blocks, at least 1, where there is one factory.
        layers: The kind of every block, in order, where there is one factory per kind.
        head: Factory of the head, or what `vocab_head` makes, which knows its loss.
        loss: ``(logits, mb) -> (loss_sum, weight)``, where `logits` is what the head returns: two scalars. Or
            ``-> (loss_sum, weight, metrics)``, see `HeadLoss`.
        tie: Leaves that live in the embedding though the head, or all blocks of a kind, use them, see `Model`:
            ``{"head/kernel": "embed/table", "blocks/encoder/bias": "embed/bias"}``.
        aux_weight: What the blocks' `aux` count, see `Model`.
        embed_call: How the embedding is called: ``(module, mb) -> carry``.
        block_call: How a block is called: ``(module, carry, mb) -> carry``, or ``-> (carry, aux)``; `mb` for masks and
            positions. Or a function per kind. None, and for kinds left out: with the carry alone.
        head_call: How the head is called: ``(module, carry, mb) -> logits``.
        carry_spec: How what passes from block to block lies over the mesh axis `tensor`, see `Model`.
        divisible_by_tensor: What the mesh axis `tensor` must divide, see `Model`: ``{"num_heads": 12}``.

    Returns:
        The model, ready for `Pipeline` and `sequential`.

    Raises:
        ConfigError: A module with state that is neither `nnx.Param` nor a random stream, or kinds that do not fit
            together.

    Example:
        >>> model = nnx_model(
        ...     embed=lambda rngs: nnx.Embed(10, 4, rngs=rngs),
        ...     block=lambda rngs: nnx.Linear(4, 4, rngs=rngs),
        ...     num_layers=3,
        ...     head=lambda rngs: nnx.Linear(4, 1, rngs=rngs),
        ...     loss=lambda y, mb: (((y[..., 0] - mb["y"]) ** 2).sum(), mb["y"].size),
        ...     embed_call=lambda module, mb: module(mb["x"]),
        ... )
        >>> params = model.blocks[0].init(jax.random.key(0), None)
        >>> jax.tree.map(jnp.shape, params)
        {'bias': (4,), 'kernel': (4, 4)}
    """
    if (loss is None) != isinstance(head, VocabHead):
        raise ConfigError("loss=… goes with a head that is a factory, and only with one; try head=vocab_head(…)")
    return Model(
        embed=embed if isinstance(embed, VocabEmbed) else embed_of(NNXPart("embed", embed, embed_call)),
        blocks=blocks_of(block, num_layers, layers, {"block_call": block_call}, block_part, noun="factory"),
        head_loss=head if isinstance(head, VocabHead) else head_of(NNXPart("head", head, head_call), loss),
        tie=dict(tie or {}),
        aux_weight=aux_weight,
        carry_spec=carry_spec or PartitionSpec(),
        divisible_by_tensor=dict(divisible_by_tensor or {}),
    )


def vocab_embed(
    factory: Factory,
    *,
    table: str,
    tokens: Callable[[Tree], Tree],
    finish: Callable[[Any, Tree, Tree], Tree] = lambda module, rows, mb: rows,
) -> VocabEmbed:
    """An embedding whose table can stay cut by vocabulary, see `VocabEmbed`.

    Args:
        factory: Factory of the module.
        table: Path of its table, a leaf ``[V, D]``.
        tokens: ``mb -> ids``.
        finish: How the rest of the module is called: ``(module, rows, mb) -> carry``. It must not use the table.
    """
    part = NNXPart("embed", factory, finish)
    return VocabEmbed(
        init=lambda key, mb: part.init(key),
        table=table,
        tokens=tokens,
        finish=lambda params, rows, mb, key: part.apply(params, key, rows, mb),
        specs=part.specs,
    )


def vocab_head(
    factory: Factory,
    *,
    kernel: str,
    targets: Callable[[Tree], tuple[Any, Any]],
    features: Callable[[Any, Tree, Tree], Any] = lambda module, carry, mb: module(carry),
    chunk: int | None = None,
) -> VocabHead:
    """A head with cross entropy whose kernel can stay cut by vocabulary, see `VocabHead`.

    Args:
        factory: Factory of the module.
        kernel: Path of its kernel, a leaf ``[V, D]``.
        targets: ``mb -> (ids, weights)``.
        features: How the rest of the module is called: ``(module, carry, mb) -> [rows, ..., D]``. It must not use the
            kernel.
        chunk: Tokens whose logits are computed at once, see `VocabHead`.
    """
    part = NNXPart("head", factory, features)
    return VocabHead(
        init=lambda key, carry, mb: part.init(key),
        kernel=kernel,
        features=lambda params, carry, mb, key: part.apply(params, key, carry, mb),
        targets=targets,
        specs=part.specs,
        chunk=chunk,
    )
