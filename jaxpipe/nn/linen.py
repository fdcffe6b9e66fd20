"""Flax Linen modules as a pipeline's model: what they keep in ``"params"`` is all they keep.

A Linen module is a description; its parameters appear when it is first called. So the pipeline calls every module once
to make them, and afterwards with the parameters that it holds and with random streams from the key of the call. Any
other collection would be state: a pipeline runs a block many times, in an order that the schedule decides, so a
statistic or a cache that a call updates would have no defined value.

Parameters are Linen's own nested dicts: ``{"attn": {"query": {"kernel": …}}, "Dense_0": …}``.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import core, errors
from flax import linen as nn
from jax.sharding import AbstractMesh

from jaxpipe.errors import ConfigError
from jaxpipe.nn.parts import blocks_of, embed_of, head_of
from jaxpipe.runtime.model import Model
from jaxpipe.runtime.tree import Tree

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

    Returns:
        The model, ready for `Pipeline` and `sequential`. Its parameters are bare arrays: where they are placed is up to
        the pipeline, not to annotations like `nn.with_partitioning`.

    Raises:
        ConfigError: Kinds that do not fit together, or a block that needs `block_init`. When parameters are made, a
            module with another collection than "params". When a module is called, one that draws from a random
            stream that it was not given.

    Example:
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
    streams = tuple(rngs)

    def block_part(kind: str, module: nn.Module, block_call: BlockCall | None, block_init: BlockInit | None) -> _Part:
        if block_init is None:
            _refuse_inputs(kind, module)
        make = block_init or (lambda module, carry: _call_plainly(module, carry, True))
        return _Part(kind, module, make, block_call or _call_plainly, streams)

    def end_part(name: str, module: nn.Module, call: Callable | None) -> _Part:
        call = call or _call_plainly
        return _Part(name, module, lambda module, *inputs: call(module, *inputs, True), call, streams)

    calls = {"block_call": block_call, "block_init": block_init}
    return Model(
        embed=embed_of(end_part("embed", embed, embed_call)),
        blocks=blocks_of(block, num_layers, layers, calls, block_part, noun="module"),
        head_loss=head_of(end_part("head", head, head_call), loss),
        tie=dict(tie or {}),
        aux_weight=aux_weight,
    )


@dataclass(frozen=True)
class _Part:
    """One module as two functions, see `jaxpipe.nn.parts.Part`.

    Attributes:
        name: What errors call it.
        module: The module, unbound.
        make: ``(module, *inputs)``, a call that makes the parameters.
        call: ``(module, *inputs, deterministic)``.
        streams: Names of its random streams.
    """

    name: str
    module: nn.Module
    make: Callable[..., Any]
    call: Callable[..., Any]
    streams: tuple[str, ...]

    def init(self, key, *inputs) -> dict[str, Any]:
        """The parameters of a new module, the numbers of ``module.init(key, …)``."""
        rngs = {**self._rngs(key), "params": key}
        # Within a mesh, Flax would place what is annotated, on axes that the pipeline's mesh need not have.
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            variables = core.unfreeze(core.meta.unbox(self.module.init(rngs, *inputs, method=self.make)))
        params = variables.pop("params", {})
        _refuse_state(self.name, variables)
        return params

    def apply(self, params, key, *inputs):
        """Calls the module with these parameters, and with random streams from `key`."""
        deterministic = key is None
        rngs = None if deterministic else self._rngs(key)
        try:
            return self.module.apply({"params": params}, *inputs, deterministic, rngs=rngs, method=self.call)
        except errors.InvalidRngError as error:
            stream = re.search('needs PRNG for "(.*?)"', str(error))
            if stream is None:
                raise
            raise ConfigError(self._missing(stream[1], deterministic)) from error

    def _rngs(self, key) -> dict[str, Any]:
        return {name: jax.random.fold_in(key, number) for number, name in enumerate(self.streams)}

    def _missing(self, stream: str, deterministic: bool) -> str:
        draws = f"{self.name} draws from the random stream {stream!r}"
        if deterministic:
            return f"{draws} in a call without a key; try passing on what its call function gets as deterministic"
        return f"{draws} but rngs={self.streams}; try rngs={(*self.streams, stream)}"


def _call_plainly(module, value: Tree, *mb_and_deterministic):
    """Calls a module with one input, and with `deterministic` if it takes that."""
    *_, deterministic = mb_and_deterministic
    takes = {parameter.name for parameter in _parameters(module)}
    return module(value, **{name: flag for name, flag in _flags(deterministic).items() if name in takes})


def _flags(deterministic: bool) -> dict[str, bool]:
    """The parameters of a ``__call__`` that say whether it is deterministic."""
    return {"deterministic": deterministic, "train": not deterministic, "training": not deterministic}


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    """What its ``__call__`` takes besides the module."""
    return list(inspect.signature(type(module).__call__).parameters.values())[1:]


def _is_required(parameter: inspect.Parameter) -> bool:
    starred = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not starred


def _refuse_inputs(kind: str, module: nn.Module):
    """Raises for a block that cannot be called with the carry alone."""
    others = _parameters(module)[1:]
    needed = [other.name for other in others if _is_required(other) and other.name not in _flags(True)]
    if needed:
        raise ConfigError(
            f"{kind}.__call__ needs {needed[0]!r} besides the carry, but a block's parameters are made from the carry; "
            f"try block_init=lambda module, carry: module(carry, {needed[0]}=…)"
        )


def _refuse_state(name: str, collections: dict[str, Any]):
    """Raises for the first leaf that is not a parameter."""
    for path, _ in jax.tree.leaves_with_path(collections):
        keys = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
        raise ConfigError(
            f"{name}.{'/'.join(keys)} is in the collection {keys[0]!r}, but a pipeline's modules may hold only "
            "'params'; try computing it in __call__, returning a loss instead of sowing it, or a layer without state "
            "(LayerNorm for BatchNorm)"
        )
