"""Trees of arrays: their shapes, paths in nested dicts, and ties: a leaf of the head that lives in the embedding."""

from collections.abc import Mapping
from typing import Any

import jax

from jaxpipe.errors import PartitionError

Tree = Any
"""A pytree of arrays."""


def shapes_of(tree: Tree) -> Tree:
    """Shapes and dtypes as a traced function gets them: without 64 bits, NumPy's int64 is JAX's int32.

    Args:
        tree: Arrays, NumPy's too, or shapes.
    """

    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype, allow_extended_dtype=True))

    return jax.tree.map(shape, tree)


def get_path(tree: Tree, path: str):
    """The leaf or subtree at a slash-separated path below `tree`.

    Raises:
        PartitionError: There is nothing at the path.
    """
    for depth, key in enumerate(parts := path.split("/")):
        if not isinstance(tree, Mapping) or key not in tree:
            have = ", ".join(map(str, tree)) if isinstance(tree, Mapping) else "no keys"
            raise PartitionError(f"path {path!r} has no {'/'.join(parts[: depth + 1])!r}; there is {have}")
        tree = tree[key]
    return tree


def set_path(tree: Tree, path: str, value) -> Tree:
    """A copy of `tree` with `value` at a slash-separated path; missing dicts on the way are made."""
    key, _, rest = path.partition("/")
    return {**tree, key: set_path(tree.get(key, {}), rest, value) if rest else value}


def drop_path(tree: Tree, path: str) -> Tree:
    """A copy of `tree` without what is at the path, nor the dicts that are empty then."""
    key, _, rest = path.partition("/")
    below = drop_path(tree[key], rest) if rest else {}
    return {k: below if k == key else v for k, v in tree.items() if k != key or below}


def tie(params: Tree, embed: Tree, ties: Mapping[str, str]) -> Tree:
    """Parameters with the tied leaves put in from the embedding.

    Args:
        params: Those of the head or of a block, without its tied leaves.
        embed: The embedding's.
        ties: From paths in `params` to paths in `embed`.
    """
    for to, source in ties.items():
        params = set_path(params, to, get_path(embed, source))
    return params


def untie(params: Tree, ties: Mapping[str, str]) -> Tree:
    """Parameters of one's own: without the tied leaves."""
    for to in ties:
        get_path(params, to)
        params = drop_path(params, to)
    return params
