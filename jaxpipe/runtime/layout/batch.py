"""What a batch holds and who reads it: nothing in it is left aside without a word.

A mask that a model does not know changes nothing, and the numbers that come out are those of another task. A model that
says what it reads (`Model.batch`) is given nothing else; of any other it is found out by tracing which leaves its
functions read.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

import jax

from jaxpipe.errors import ConfigError
from jaxpipe.jax_internals import dce_jaxpr
from jaxpipe.runtime.layout.tree import Tree, tie
from jaxpipe.runtime.model import Model


def check_names(model: Model, batch: Tree, whole: bool = True) -> None:
    """Checks the names in a batch where the model says what it reads.

    Args:
        model: The model.
        batch: The batch.
        whole: Whether all that the model needs must be there; parameters are made from less.

    Raises:
        ConfigError: A name that it does not read, or one that it needs and that is not there.
    """
    known = model.batch
    if not known:
        return
    names = ", ".join(map(repr, known))
    if not isinstance(batch, Mapping):
        raise ConfigError(f"batch is a {type(batch).__name__} but must be a dict; this model reads {names}")
    for name in batch:
        if name not in known:
            near = get_close_matches(str(name), known, n=1, cutoff=0.4)
            hint = f"try {near[0]!r}, or leave it out" if near else "leave it out"
            raise ConfigError(f"batch[{name!r}] is not read by this model, which reads {names}; {hint}")
    for name, needed in known.items():
        if whole and needed and name not in batch:
            given = ", ".join(map(repr, batch)) or "nothing"
            raise ConfigError(f"batch has {given} but this model needs {name!r}; it reads {names}")


def warn_of_unread(model: Model, params: Tree, carry: Tree, mb: Tree, key: Any) -> None:
    """Warns of leaves of a batch that no function of the model reads, with a key or without.

    Args:
        model: The model.
        params: Shapes: ``{"embed", "head"}``, and under ``blocks`` those of one block of each kind.
        carry: Shapes.
        mb: Shapes of a row group.
        key: Shape of a key.
    """
    calls = list(_calls(model, params, carry))
    leaves = jax.tree.leaves_with_path(mb)
    read = [False] * len(leaves)
    for call in calls:
        read = [a or b for a, b in zip(read, _reads(call, mb, key), strict=True)]
        if all(read):
            return
    unread = [path for (path, _), used in zip(leaves, read, strict=True) if not used]
    # What only the shape is taken of is read too: without it the functions fail.
    makers = [
        lambda mb, key: jax.eval_shape(model.embed.init, key, mb),
        lambda mb, key: jax.eval_shape(model.head_loss.init, key, carry, mb),
    ]
    unread = [path for path in unread if not _fails([*calls, *makers], _without(mb, path), key)]
    if unread:
        paths = ", ".join(f"batch{jax.tree_util.keystr(path)}" for path in unread)
        warnings.warn(
            f"no function of the model reads {paths}, which has no effect; try reading it in embed, in a block "
            "(block_call=… of the adapters) or in the loss, or leaving it out",
            stacklevel=2,
        )


def _calls(model: Model, params: Tree, carry: Tree) -> Iterator[Callable[[Tree, Any], Any]]:
    """The functions that read a microbatch, each as ``(mb, key) -> outputs``."""

    def of(apply: Callable, *known: Tree) -> Callable[[Tree, Any], Any]:
        return lambda mb, key: jax.make_jaxpr(lambda mb, known, key: apply(*known, mb, key))(mb, known, key)

    embed = params["embed"]
    yield of(model.embed.apply, embed)
    for kind, block in {block.kind: block for block in model.blocks}.items():
        yield of(block.apply, tie(params["blocks"][kind], embed, model.block_tie(kind)), carry)
    yield of(model.head_loss.apply, tie(params["head"], embed, model.head_tie), carry)


def _reads(call: Callable, mb: Tree, key: Any) -> list[bool]:
    """Which leaves of a microbatch a function reads, with a key or without."""
    count, found = len(jax.tree.leaves(mb)), []
    for some_key in (key, None):
        with suppress(Exception):  # of a function that wants a key, or none
            closed = call(mb, some_key)
            found.append(dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))[1][:count])
    return [any(each) for each in zip(*found, strict=True)] if found else [True] * count


def _fails(functions: list[Callable], mb: Tree, key: Any) -> bool:
    """Whether any function cannot be called with a microbatch."""
    try:
        for function in functions:
            function(mb, key)
    except Exception:  # whatever a user's function raises over what is not there
        return True
    return False


def _without(tree: Tree, path: tuple) -> Tree:
    """A microbatch without one leaf; outside of dicts None is in its place."""
    if not path:
        return None
    if not isinstance(tree, Mapping):
        return jax.tree.map_with_path(lambda at, leaf: None if at == path else leaf, tree)
    below = {name: leaf for name, leaf in tree.items() if name != path[0].key}
    return below if len(path) == 1 else below | {path[0].key: _without(tree[path[0].key], path[1:])}
