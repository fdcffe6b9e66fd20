"""Flax Linen modules as a pipeline's model: what they keep in ``"params"`` is all they keep.

A Linen module is a description; its parameters appear when it is first called. So the pipeline calls every module once
to make them, and afterwards with the parameters that it holds and with random streams from the key of the call. Any
other collection would be state: a pipeline runs a block many times, in an order that the schedule decides, so a
statistic or a cache that a call updates would have no defined value.

Parameters are Linen's own nested dicts: ``{"attn": {"query": {"kernel": …}}, "Dense_0": …}``.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import linen as nn

from jaxpipe.errors import ConfigError
from jaxpipe.nn.linen_part import LinenPart, call_with_flag, flags, parameters
from jaxpipe.nn.linen_pipelined import Pipelined
from jaxpipe.nn.parts import blocks_of, embed_of, head_of
from jaxpipe.runtime.layout.tree import Tree
from jaxpipe.runtime.model import Model, Specs

__all__ = ["BlockCall", "BlockInit", "Pipelined", "linen_model"]

BlockCall = Callable[[Any, Tree, Tree, bool], Any]
"""``(module, carry, mb, deterministic) -> carry``, or ``-> (carry, aux)`` with a scalar that joins the loss."""

BlockInit = Callable[[Any, Tree], Any]
"""``(module, carry) -> anything``: a call that makes the parameters."""


def linen_model(
    *,
    embed: nn.Module,
    block: nn.Module | Mapping[str, nn.Module],
    num_layers: int | None = None,
    layers: Sequence[str] | None = None,
    head: nn.Module,
    loss: Callable[[Any, Tree], tuple],
    tie: Mapping[str, str] | None = None,
    aux_weight: float = 1.0,
    embed_call: Callable[[Any, Tree, bool], Tree] | None = None,
    block_call: BlockCall | Mapping[str, BlockCall] | None = None,
    block_init: BlockInit | Mapping[str, BlockInit] | None = None,
    head_call: Callable[[Any, Tree, Tree, bool], Any] | None = None,
    rngs: Sequence[str] = ("dropout",),
    specs: Mapping[str, Specs] | None = None,
    divisible_by_tensor: Mapping[str, int] | None = None,
) -> Model:
    """Makes a model from Linen modules.

    The functions that say how a module is called get it bound to its parameters and random streams, so that it is
    called as within another module: ``module(x)``, ``module.decode(x)``. Their last argument, `deterministic`, is True
    where there is no key, and while parameters are made. Without such a function a module is called with one input,
    and `deterministic` reaches it if its ``__call__`` has a parameter `deterministic`, or, turned round, `train` or
    `training`.

    Args:
        embed: The embedding.
        block: One transformer layer, whose output is like its input in structure, shapes and dtypes. Or a module per
            kind of layer, ``{"encoder": …, "decoder": …}``.
        num_layers: Number of blocks, at least 1, where there is one module.
        layers: The kind of every block, in order, where there is one module per kind.
        head: The head.
        loss: ``(logits, mb) -> (loss_sum, weight)``, where `logits` is what the head returns: two scalars. Or
            ``-> (loss_sum, weight, metrics)``, see `HeadLoss`.
        tie: Leaves that live in the embedding though the head, or all blocks of a kind, use them, see `Model`:
            ``{"head/kernel": "embed/embedding", "blocks/encoder/bias": "embed/bias"}``.
        aux_weight: What the blocks' `aux` count, see `Model`.
        embed_call: How the embedding is called: ``(module, mb, deterministic) -> carry``.
        block_call: How a block is called: ``(module, carry, mb, deterministic) -> carry``, or ``-> (carry, aux)``; `mb`
            for masks and positions. Or a function per kind. None, and for kinds left out: with the carry alone.
        block_init: How a block is called to make its parameters, which are made without a batch: ``(module, carry)``.
            Or a function per kind. None, and for kinds left out: with the carry alone.
        head_call: How the head is called: ``(module, carry, mb, deterministic) -> logits``.
        rngs: Names of the random streams that the modules draw from.
        specs: Which dims of which parameters lie cut over the mesh axis `tensor`, for ``embed``, ``head`` and the kinds
            of block (``block`` where there is one): ``{"block": {"mlp": {"kernel": PartitionSpec(None, "tensor")}}}``,
            or ``{"block": nn.get_partition_spec(variables)["params"]}`` where modules are annotated.
        divisible_by_tensor: What `tensor` must divide, see `Model`: ``{"num_heads": 12}``.

    Returns:
        The model, ready for `Pipeline` and `sequential`. Its parameters are bare arrays: where they are placed is up to
        the pipeline and to `specs`, not to annotations like `nn.with_partitioning` themselves.

    Raises:
        ConfigError: Kinds that do not fit together, or a block that needs `block_init`. When parameters are made, a
            module with another collection than "params". When a module is called, one that draws from a random
            stream that it was not given.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> model = linen_model(
        ...     embed=nn.Embed(10, 4),
        ...     block=nn.Sequential([nn.Dense(4), nn.tanh]),
        ...     num_layers=3,
        ...     head=nn.Dense(1),
        ...     loss=lambda y, mb: (((y[..., 0] - mb["y"]) ** 2).sum(), mb["y"].size),
        ...     embed_call=lambda module, mb, deterministic: module(mb["x"]),
        ... )
        >>> params = model.blocks[0].init(jax.random.key(0), jnp.zeros((2, 4)))
        >>> jax.tree.map(jnp.shape, params)
        {'layers_0': {'bias': (4,), 'kernel': (4, 4)}}
    """
    if isinstance(rngs, str):
        raise ConfigError(f"rngs={rngs!r} must be a sequence of names; try rngs=({rngs!r},)")
    streams, specs = tuple(rngs), dict(specs or {})
    kinds = list(block) if isinstance(block, Mapping) else ["block"]
    if wrong := [name for name in specs if name not in ("embed", "head", *kinds)]:
        raise ConfigError(
            f"specs names {wrong[0]!r} but the model has {', '.join(map(repr, ('embed', *kinds, 'head')))}"
        )

    def block_part(
        kind: str, module: nn.Module, block_call: BlockCall | None, block_init: BlockInit | None
    ) -> LinenPart:
        if block_init is None:
            _refuse_inputs(kind, module)
        make = block_init or (lambda module, carry: _call_plainly(module, carry, True))
        return LinenPart(kind, module, make, block_call or _call_plainly, streams, specs=specs.get(kind, {}))

    def end_part(name: str, module: nn.Module, call: Callable | None) -> LinenPart:
        call = call or _call_plainly

        def make(module, *inputs):
            return call(module, *inputs, True)

        return LinenPart(name, module, make, call, streams, specs=specs.get(name, {}))

    calls = {"block_call": block_call, "block_init": block_init}
    return Model(
        embed=embed_of(end_part("embed", embed, embed_call)),
        blocks=blocks_of(block, num_layers, layers, calls, block_part, noun="module"),
        head_loss=head_of(end_part("head", head, head_call), loss),
        tie=dict(tie or {}),
        aux_weight=aux_weight,
        divisible_by_tensor=dict(divisible_by_tensor or {}),
    )


def _call_plainly(module, value: Tree, *mb_and_deterministic):
    """Calls a module with one input, and with `deterministic` if it takes that."""
    *_, deterministic = mb_and_deterministic
    return call_with_flag(module, value, deterministic=deterministic)


def _is_required(parameter: inspect.Parameter) -> bool:
    starred = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not starred


def _refuse_inputs(kind: str, module: nn.Module):
    """Raises for a block that cannot be called with the carry alone."""
    others = parameters(module)[1:]
    needed = [other.name for other in others if _is_required(other) and other.name not in flags(True)]
    if needed:
        raise ConfigError(
            f"{kind}.__call__ needs {needed[0]!r} besides the carry, but a block's parameters are made from the carry; "
            f"try block_init=lambda module, carry: module(carry, {needed[0]}=…)"
        )
