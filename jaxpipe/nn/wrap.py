"""A Flax NNX model that exists already, as a pipeline's model and back.

Blocks are found inside the user's model by their path; what is around them is one module, of which two functions use
what they like. So it is not known beforehand which parameter belongs to the embedding and which to the head: the
functions are traced, and a parameter goes where it is read. One that both read lives in the embedding and is tied.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.errors import ConfigError
from jaxpipe.flax_nnx import nnx
from jaxpipe.jax_internals import dce_jaxpr
from jaxpipe.nn.blocks import check_alike, find_blocks, take_out
from jaxpipe.nn.nnx_part import BlockCall, NNXPart, block_part, params_of
from jaxpipe.nn.parts import block_of, embed_of, head_of
from jaxpipe.runtime.layout.tree import Tree, get_path, set_path, shapes_of, tie, untie
from jaxpipe.runtime.model import Block, Model


def from_nnx(
    module: nnx.Module,
    *,
    blocks: str,
    embed: Callable[[Any, Tree], Tree],
    head: Callable[[Any, Tree, Tree], Any],
    loss: Callable[[Any, Tree], tuple],
    batch: Tree,
    block_call: BlockCall | None = None,
    kinds: Sequence[str] | None = None,
    aux_weight: float = 1.0,
) -> "Wrapped":
    """Makes a pipeline's model from an NNX model that has its parameters already.

    Training goes on from the model's own values, and ends in a copy of it::

        wrapped = from_nnx(module, blocks="decoder.layers", …)
        pipe = Pipeline(wrapped.model, …)
        params = pipe.from_canonical(wrapped.canonical())
        …
        module = wrapped.write_back(pipe.to_canonical(params))

    `Pipeline.init` gives the same values, whatever the key, but compiles them into a program; for a large model take
    `Wrapped.canonical`.

    With a key, modules run as they are now, so call `nnx.Module.train` on the model before; without one, in
    `nnx.Module.eval` mode. Every random stream starts anew at each call, as in `nnx_model`.

    A parameter that blocks share is one leaf, in the embedding, see `Model.tie`. It must be in all blocks of a kind at
    the same place; it may be used around them too.

    Args:
        module: The model. It is not changed.
        blocks: Dotted path of its blocks, an `nnx.List`, `nnx.Sequential`, `nnx.Dict` with numbers as keys, or list.
        embed: The model before its blocks: ``(module, mb) -> carry``.
        head: The model after its blocks: ``(module, carry, mb) -> logits``. Both may use any part but the blocks.
        loss: ``(logits, mb) -> (loss_sum, weight)`` or ``-> (loss_sum, weight, metrics)``, see `HeadLoss`.
        batch: Any batch, arrays or shapes, leaves ``[B, ...]``: to see what `embed` and `head` read.
        block_call: How a block is called: ``(block, carry, mb) -> carry``, or ``-> (carry, aux)``. None: with the
            carry alone.
        kinds: The kind of every block, in order: those of a kind are alike but for values. By default all are.
        aux_weight: What the blocks' `aux` count, see `Model`.

    Returns:
        The model for `Pipeline` and `sequential`, and the way back.

    Raises:
        ConfigError: No blocks at the path; a function that uses the blocks; state that is neither `nnx.Param` nor a
            random stream; or a parameter that only some blocks share.
        PartitionError: Blocks of a kind that are not alike.

    Warns:
        UserWarning: A parameter that neither function reads. It has no gradient and keeps its value.

    Example:
        >>> class Tower(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.table = nnx.Embed(10, 4, rngs=rngs)
        ...         self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(3)])
        >>> wrapped = from_nnx(
        ...     Tower(nnx.Rngs(0)),
        ...     blocks="layers",
        ...     embed=lambda tower, mb: tower.table(mb["x"]),
        ...     head=lambda tower, carry, mb: tower.table.attend(carry),
        ...     loss=lambda logits, mb: (-jax.nn.log_softmax(logits)[..., 0].sum(), 1.0 * mb["x"].size),
        ...     batch={"x": jax.ShapeDtypeStruct((8, 5), jnp.int32)},
        ... )
        >>> wrapped.model.tie
        {'head/table/embedding': 'embed/table/embedding'}
        >>> jax.tree.map(jnp.shape, wrapped.canonical()["blocks"])
        {'block': {'bias': (3, 4), 'kernel': (3, 4, 4)}}
    """
    path, items = find_blocks(module, blocks)
    _refuse_shapes(module)
    kinds = _kinds(kinds, len(items))
    for kind in dict.fromkeys(kinds):
        check_alike([(n, block) for n, (_, block) in enumerate(items) if kinds[n] == kind], blocks)
    keys = [_slashed((*path, key)) for key, _ in items]
    ties = _shared(*take_out(module, blocks), keys, kinds)
    before, after = (NNXPart("model", lambda rngs: take_out(module, blocks)[0], call) for call in (embed, head))
    mb = shapes_of(batch)
    carry, used = _reads(before, mb)
    in_embed = {*used, *(home.removeprefix("embed/") for home in ties.values())}
    in_head = _reads(after, carry, mb)[1]
    _warn_of_unread([path for path in _shapes(before) if path not in in_embed | in_head])
    return Wrapped(
        module,
        blocks,
        Model(
            embed=embed_of(_End(module, blocks, before, sorted(in_embed))),
            blocks=_blocks(items, kinds, blocks, block_call),
            head_loss=head_of(_End(module, blocks, after, sorted(in_head)), loss),
            tie=ties | {f"head/{path}": f"embed/{path}" for path in sorted(in_head & in_embed)},
            aux_weight=aux_weight,
        ),
    )


@dataclass(frozen=True)
class Wrapped:
    """What `from_nnx` makes.

    Attributes:
        module: The user's model, never changed.
        blocks: Where its blocks are.
        model: The same for `Pipeline` and `sequential`.
    """

    module: nnx.Module
    blocks: str
    model: Model

    def canonical(self) -> Tree:
        """The canonical tree of the values that the user's model has now, as copies.

        Returns:
            ``{"embed", "blocks": {kind: leaves [L_kind, ...]}, "head"}``, for `Pipeline.from_canonical`.
        """
        layers: dict[str, list] = {}
        for block in self.model.blocks:
            layers.setdefault(block.kind, []).append(untie(block.init(None, None), self.model.block_tie(block.kind)))
        ends = {
            "embed": self.model.embed.init(None, None),
            "head": untie(self.model.head_loss.init(None, None, None), self.model.head_tie),
        }
        stacked = {kind: jax.tree.map(lambda *x: jnp.stack(x), *trees) for kind, trees in layers.items()}
        # Copies, for a training step may donate what the pipeline is given.
        return {**jax.tree.map(jnp.copy, ends), "blocks": stacked}

    def write_back(self, canonical: Tree) -> Any:
        """A copy of the user's model with other values.

        Classes, types and metadata of variables, random streams and parameters that have no gradient are those of the
        user's model. The new values are copies, in its dtypes and where its values are.

        Args:
            canonical: A canonical tree, from `Pipeline.to_canonical`.

        Raises:
            ConfigError: The tree is not like `canonical`.
        """
        _check_like(canonical, jax.eval_shape(self.canonical))
        module = nnx.clone(self.module)
        rows: dict[str, Iterator[int]] = {}
        for block, (_, own) in zip(self.model.blocks, find_blocks(module, self.blocks)[1], strict=True):
            row = next(rows.setdefault(block.kind, count()))
            params = jax.tree.map(lambda leaf, row=row: leaf[row], canonical["blocks"][block.kind])
            _write(own, tie(params, canonical["embed"], self.model.block_tie(block.kind)))
        _write(module, canonical["embed"])
        _write(module, canonical["head"])
        return module


@dataclass(frozen=True)
class _End:
    """The embedding or the head: a function of what is around the blocks, see `jaxpipe.nn.parts.Part`.

    Attributes:
        module: The user's model.
        blocks: Where its blocks are.
        part: All that is around the blocks, called by the user's function.
        paths: The parameters that are in its tree.
    """

    module: nnx.Module
    blocks: str
    part: NNXPart
    paths: Sequence[str]

    @property
    def specs(self) -> dict[str, Any]:
        """The annotations of its own parameters."""
        return {path: spec for path, spec in self.part.specs.items() if path in self.paths}

    def init(self, key, *inputs) -> Tree:
        """The values that the user's model has now."""
        path, items = find_blocks(self.module, self.blocks)
        values = params_of(take_out(self.module, self.blocks)[0])
        for at, block in items:
            values = set_path(values, _slashed((*path, at)), params_of(block))
        return _nested({path: get_path(values, path) for path in self.paths})

    def apply(self, params, key, *inputs):
        """Calls the user's function; what it does not read is there in shape only."""
        values = {}
        for path, shape in _shapes(self.part).items():
            values[path] = get_path(params, path) if path in self.paths else jnp.zeros(shape.shape, shape.dtype)
        return self.part.apply(_nested(values), key, *inputs)


def _blocks(items: Sequence[tuple[Any, nnx.Module]], kinds: Sequence[str], name: str, call) -> list[Block]:
    """One `Block` per layer, whose `init` gives the values that it has now; those of a kind run the same function."""
    parts: dict[str, NNXPart] = {}
    for kind, (key, block) in zip(kinds, items, strict=True):
        if kind not in parts:
            parts[kind] = block_part(f"{name}.{key}", lambda rngs, block=block: block, call)
    made = {kind: block_of(kind, part) for kind, part in parts.items()}
    return [
        replace(made[kind], init=lambda key, carry, block=block: params_of(block))
        for kind, (_, block) in zip(kinds, items, strict=True)
    ]


def _shared(around: nnx.Module, blocks: Sequence[nnx.Module], paths: Sequence[str], kinds: Sequence[str]) -> dict:
    """The ties of parameters that are in several blocks, or in blocks and around them.

    Args:
        around: The model without its blocks.
        blocks: They have their shared parameters in common as objects.
        paths: Where each is in the model.
        kinds: The kind of each.

    Raises:
        ConfigError: A shared parameter is not in all blocks of a kind at the same place.
    """
    homes = {id(variable): path for path, variable in _params(around)}
    users: dict[int, dict[tuple[str, str], list[int]]] = {}
    for number, block in enumerate(blocks):
        for path, variable in _params(block):
            users.setdefault(id(variable), {}).setdefault((kinds[number], path), []).append(number)
    ties = {}
    for variable, places in users.items():
        first, *others = [f"{paths[n]}/{path}" for (_, path), numbers in places.items() for n in numbers]
        if not others and variable not in homes:
            continue
        home = homes.get(variable, first)
        if any(len(numbers) != kinds.count(kind) for (kind, _), numbers in places.items()):
            raise ConfigError(
                f"{first} and {others[0] if others else home} are one parameter, but one that blocks share must be in "
                "all blocks of a kind at the same place; try one of their own for each, or kinds=[…]"
            )
        ties |= {f"blocks/{kind}/{path}": f"embed/{home}" for kind, path in places}
    return ties


def _reads(part: NNXPart, *inputs: Tree) -> tuple[Tree, set[str]]:
    """The shapes that a part returns, and which parameters it reads, with or without a key."""
    shapes, out, read = _shapes(part), None, set()
    for key in (jax.random.key(0), None):

        def run(leaves, *inputs, key=key):
            return part.apply(_nested(dict(zip(shapes, leaves, strict=True))), key, *inputs)

        closed, out = jax.make_jaxpr(run, return_shape=True)(list(shapes.values()), *inputs)
        used = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))[1]
        read |= {path for path, is_used in zip(shapes, used, strict=False) if is_used}
    return out, read


def _shapes(part: NNXPart) -> dict[str, Any]:
    """Shapes of all parameters of a part, by path."""
    return {_slashed(path): variable.get_value() for path, variable in part.params}


def _kinds(kinds: Sequence[str] | None, num_blocks: int) -> list[str]:
    if kinds is None:
        return ["block"] * num_blocks
    if isinstance(kinds, str) or len(kinds) != num_blocks:
        raise ConfigError(f"kinds={kinds!r} must name the kind of each of {num_blocks} blocks; try one name per block")
    return list(kinds)


def _refuse_shapes(module: nnx.Module) -> None:
    for path, variable in _params(module):
        if isinstance(variable.get_value(), jax.ShapeDtypeStruct):
            raise ConfigError(f"{path} has a shape but no value; try the model itself, not what nnx.eval_shape returns")


def _warn_of_unread(paths: Sequence[str]) -> None:
    if paths:
        warnings.warn(
            f"neither embed=… nor head=… reads {', '.join(paths)}, which gets no gradient and keeps its value; "
            "try reading it, or deleting it from the model",
            stacklevel=3,
        )


def _check_like(canonical: Tree, expected: Tree) -> None:
    """Raises ConfigError unless a tree has the structure and shapes of the model's."""
    own, given = (
        {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (expected, canonical)
    )
    for path in (*own, *given):
        if own.get(path) != given.get(path):
            raise ConfigError(
                f"canonical{path} has shape {given.get(path, 'nothing')} but the model has {own.get(path, 'nothing')}; "
                "try Pipeline.to_canonical(params)"
            )


def _write(module: nnx.Module, params: Tree) -> None:
    """Gives the parameters of a module that are in a tree its values."""
    values = {_slashed(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    for path, variable in _params(module):
        if path in values:
            old = variable.get_value()
            new = jnp.asarray(values[path], old.dtype)
            variable.set_value(jax.device_put(new, getattr(old, "sharding", None), may_alias=False))


def _params(module: nnx.Module) -> Iterator[tuple[str, nnx.Variable]]:
    """The parameters of a module by path, the objects themselves."""
    for path, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Param):
            yield _slashed(path), variable


def _nested(values: Mapping[str, Any]) -> Tree:
    tree: Tree = {}
    for path, value in values.items():
        tree = set_path(tree, path, value)
    return tree


def _slashed(path: Iterable) -> str:
    return "/".join(map(str, path))
