"""The blocks inside a user's NNX model: where they are, what is around them, and whether they are alike."""

import functools
import types
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import reduce
from typing import Any

import jax
import numpy as np

from jaxpipe.errors import ConfigError, PartitionError
from jaxpipe.flax_nnx import nnx


def find_blocks(module: nnx.Module, name: str) -> tuple[tuple, list[tuple[Any, nnx.Module]]]:
    """Where the blocks are, and each with its key there.

    Args:
        module: The whole model.
        name: Dotted path of an `nnx.List`, `nnx.Sequential`, `nnx.Dict` with numbers as keys, or list of modules.

    Returns:
        The path of what holds the blocks, and the blocks in order as ``(key, block)``.

    Raises:
        ConfigError: There is no such thing at the path.
    """
    found = {
        dotted(named): (path, items) for named, path, node in _containers(module) if path and (items := _items(node))
    }
    if name not in found:
        near = get_close_matches(name, found, n=1, cutoff=0.0)
        hint = f"try {near[0]!r}" if near else "the model has none; try nnx.List"
        raise ConfigError(f"blocks={name!r} must be the path of a list of modules in the model; {hint}")
    return found[name]


def take_out(module: nnx.Module, name: str) -> tuple[nnx.Module, list[nnx.Module]]:
    """A copy of a model without its blocks, and the blocks of the copy.

    Parameters that a block shares with the rest, or with another block, are the same objects in both.

    Args:
        module: The whole model, which does not change.
        name: See `find_blocks`.
    """
    copy = nnx.clone(module)
    path, items = find_blocks(copy, name)
    parent, key = reduce(_child, path[:-1], copy), path[-1]
    if isinstance(parent, nnx.List | nnx.Dict | list | dict):
        parent[key] = _TakenOut(name)  # pyright: ignore[reportArgumentType]
    else:
        setattr(parent, key, nnx.static(_TakenOut(name)))
    return copy, [block for _, block in items]


class _TakenOut:
    """What a model has in place of its blocks: an error for whoever uses them."""

    def __init__(self, name: str):
        self.name = name

    def _refuse(self, *_):
        raise ConfigError(
            f"embed=… and head=… must not use the blocks at {self.name!r}, which run between the two on stages of "
            "their own; try the modules around them one by one"
        )

    __iter__ = __len__ = __getitem__ = __call__ = _refuse


def check_alike(blocks: Sequence[tuple[int, nnx.Module]], name: str) -> None:
    """Raises PartitionError for the first block that differs from the first one in more than values.

    Args:
        blocks: Those of one kind, each with its number among all.
        name: Of what holds them.
    """
    first = dict(_facts(blocks[0][1]))
    for number, block in blocks[1:]:
        own = dict(_facts(block))
        for path in sorted({**first, **own}, key=len):
            a, b = first.get(path, _NOTHING), own.get(path, _NOTHING)
            if not _same(a, b):
                where = f" at {dotted(path)!r}" if path else ""
                raise PartitionError(
                    f"block {number} of {name!r} has {_text(b)}{where} but block {blocks[0][0]} has {_text(a)}; "
                    "blocks of a kind may differ in the values of parameters only; try kinds=[…], one for every block"
                )


def dotted(path: Sequence) -> str:
    """A path as users write it."""
    return ".".join(map(str, path))


_NOTHING = type("_Nothing", (), {})()


def _containers(module: nnx.Module) -> Iterator[tuple[tuple, tuple, Any]]:
    """Every node of a model: by which path users may name it, where it is, and the node."""
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Sequential):
            yield path, (*path, "layers"), node.layers
        else:
            yield path, path, node


def _items(node: Any) -> list[tuple[Any, nnx.Module]]:
    """The modules of a list, or of a mapping with numbers as keys, in order; none of anything else."""
    if isinstance(node, nnx.List | list | tuple):
        items = list(enumerate(node))
    elif isinstance(node, nnx.Dict | dict) and all(str(key).isdecimal() for key in node):
        items = sorted(node.items(), key=lambda item: int(item[0]))
    else:
        return []
    return items if all(isinstance(item, nnx.Module) for _, item in items) else []


def _child(node: Any, key: Any) -> Any:
    return node[key] if isinstance(node, nnx.List | nnx.Dict | list | tuple | dict) else getattr(node, key)


def _facts(block: nnx.Module) -> Iterator[tuple[tuple, Any]]:
    """All that blocks of a kind have in common, by path: classes, static attributes, and what variables look like.

    What else a variable carries (names of axes, a layer's number) is each block's own.
    """
    for path, value in nnx.iter_graph(block):
        if path and str(path[-1]).startswith("_pytree__"):
            continue
        if isinstance(value, nnx.Variable):
            held = value.get_value()
            yield path, (type(value), held.shape, held.dtype)
        elif isinstance(value, jax.Array | np.ndarray):
            yield path, (type(value), value.shape, value.dtype)
        else:
            is_node = isinstance(value, nnx.Pytree | nnx.Module) or not jax.tree_util.all_leaves([value])
            yield path, type(value) if is_node else value


def _same(a: Any, b: Any) -> bool:
    """Equality in which functions that each block makes for itself are equal if their code and what it holds are."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, types.FunctionType):
        return a.__code__ == b.__code__ and _same(_held(a), _held(b))
    if isinstance(a, functools.partial):
        return _same((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a == b)


def _held(function: types.FunctionType) -> tuple:
    """What a function holds besides its code."""
    cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
    return cells, function.__defaults__, function.__kwdefaults__


def _text(fact: Any) -> str:
    if fact is _NOTHING:
        return "nothing"
    if isinstance(fact, type):
        return fact.__name__
    if isinstance(fact, tuple) and len(fact) == 3 and isinstance(fact[0], type):
        return f"{fact[0].__name__} {fact[2]}{list(fact[1])}"
    return repr(fact)
