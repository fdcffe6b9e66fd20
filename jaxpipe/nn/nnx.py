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

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import spmd
from jax.sharding import NamedSharding, PartitionSpec

from jaxpipe.errors import ConfigError
from jaxpipe.nn.parts import blocks_of, embed_of, head_of
from jaxpipe.runtime.mesh import TENSOR
from jaxpipe.runtime.model import Model, VocabEmbed, VocabHead
from jaxpipe.runtime.tree import Tree

Factory = Callable[[nnx.Rngs], nnx.Module]
"""Makes a module from random streams."""

BlockCall = Callable[[Any, Tree, Tree], Any]
"""``(module, carry, mb) -> carry``, or ``-> (carry, aux)`` with a scalar that joins the loss."""


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
        embed=embed if isinstance(embed, VocabEmbed) else embed_of(_Part("embed", embed, embed_call)),
        blocks=blocks_of(block, num_layers, layers, {"block_call": block_call}, _block_part, noun="factory"),
        head_loss=head if isinstance(head, VocabHead) else head_of(_Part("head", head, head_call), loss),
        tie=dict(tie or {}),
        aux_weight=aux_weight,
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
    part = _Part("embed", factory, finish)
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
) -> VocabHead:
    """A head with cross entropy whose kernel can stay cut by vocabulary, see `VocabHead`.

    Args:
        factory: Factory of the module.
        kernel: Path of its kernel, a leaf ``[V, D]``.
        targets: ``mb -> (ids, weights)``.
        features: How the rest of the module is called: ``(module, carry, mb) -> [rows, ..., D]``. It must not use the
            kernel.
    """
    part = _Part("head", factory, features)
    return VocabHead(
        init=lambda key, carry, mb: part.init(key),
        kernel=kernel,
        features=lambda params, carry, mb, key: part.apply(params, key, carry, mb),
        targets=targets,
        specs=part.specs,
    )


def _block_part(kind: str, factory: Factory, block_call: BlockCall | None) -> "_Part":
    return _Part(kind, factory, block_call or (lambda module, carry, mb: module(carry)))


class _Part:
    """One module as two functions: `init` makes its parameters, `apply` calls it with given ones."""

    def __init__(self, name: str, factory: Factory, call: Callable[..., Any]):
        self.name, self.factory, self.call = name, factory, call
        graphdef: Any = None

        def split():
            nonlocal graphdef
            graphdef, *states = nnx.split(self._make(nnx.Rngs(0)), nnx.Param, nnx.RngState, ...)
            return states

        params, streams, rest = (list(nnx.to_flat_state(state)) for state in jax.eval_shape(split))
        _refuse_state(name, graphdef, rest)
        self.graphdef, self.params, self.streams = graphdef, params, streams
        self.specs = {"/".join(map(str, path)): spec for path, v in params if (spec := _tensor_spec(v))}

    def init(self, key, *inputs) -> dict[str, Any]:
        """The parameters of a new module, as nested dicts with string keys; they do not depend on its inputs."""
        return params_of(self._make(nnx.Rngs(key)))

    def apply(self, params, key, *inputs):
        """Calls the module with these parameters, and with random streams from `key`."""
        # A leaf that stays cut by vocabulary is not here; whoever reads it in spite of that finds no row.
        state = [(path, variable.replace(_at(params, path, variable))) for path, variable in self.params]
        module = nnx.merge(self.graphdef, nnx.from_flat_state(state + self._seeded(key)))
        if key is None:
            module.eval()
        return self.call(module, *inputs)

    def _make(self, rngs: nnx.Rngs):
        """The module; where its parameters are placed is up to the pipeline, not to annotations in the module."""
        with nnx.use_eager_sharding(False):
            return self.factory(rngs)

    def _seeded(self, key) -> list:
        """The random streams with their counts at zero and a key of their own each."""
        base = jax.random.key(0) if key is None else key
        if not jnp.issubdtype(base.dtype, jax.dtypes.prng_key):
            base = jax.random.wrap_key_data(base)
        state = []
        for number, (path, variable) in enumerate(self.streams):
            like = variable.get_value()
            if isinstance(variable, nnx.RngKey):
                value = jax.random.fold_in(base, number)
                value = jax.random.split(value, like.shape) if like.shape else value
            else:
                value = jnp.zeros(like.shape, like.dtype)
            state.append((path, variable.replace(value)))
        return state


def params_of(module: nnx.Module) -> dict[str, Any]:
    """The parameters of a module, as nested dicts with string keys."""
    tree: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        *parents, leaf = map(str, path)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = variable.get_value()
    return tree


def _tensor_spec(variable: nnx.Variable) -> PartitionSpec | None:
    """What a parameter's annotation says of the axis `tensor`; other axes are the pipeline's to use."""
    metadata = variable.get_metadata()
    names: Any = metadata.get("out_sharding")
    if not names:
        return None
    names = spmd.get_pspec(names, metadata.get("sharding_rules"))
    names = names.spec if isinstance(names, NamedSharding) else names
    cut = [TENSOR if TENSOR in (name if isinstance(name, tuple) else (name,)) else None for name in names]
    return PartitionSpec(*cut) if TENSOR in cut else None


def _at(params, path, like):
    for name in path:
        if str(name) not in params:
            return jnp.zeros((0, *like.get_value().shape[1:]), like.get_value().dtype)
        params = params[str(name)]
    return params


def _refuse_state(name: str, graphdef, rest: list):
    """Raises for the first leaf that is neither a parameter nor a random stream."""
    found = [(".".join(map(str, path)), leaf) for path, leaf in rest]
    # Made while tracing, an array that is a bare attribute ends up in the structure.
    bare = [(key, getattr(at, "value", None)) for key, at in graphdef.attributes]
    found += [(key, value) for key, value in bare if isinstance(value, jax.Array)]
    if found:
        path, leaf = found[0]
        kind = type(leaf).__name__ if isinstance(leaf, nnx.Variable) else "array"
        raise ConfigError(
            f"{name}.{path} is of type {kind}, but a pipeline's modules may hold only nnx.Param and random streams; "
            "try computing it in __call__, or a layer without state (LayerNorm for BatchNorm)"
        )
