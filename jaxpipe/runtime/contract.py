"""Does a model keep its side of the contract? What only shows when its functions are called, asked by shapes alone.

What a block returns is checked in `jaxpipe.runtime.stage.build`, what a head returns in `jaxpipe.runtime.model`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpipe.errors import ConfigError, JaxpipeError, PartitionError
from jaxpipe.runtime.layout.rest import slashed
from jaxpipe.runtime.layout.tree import Tree, get_path
from jaxpipe.runtime.model import Model
from jaxpipe.runtime.stage.carry import join, part


def check_new(model: Model, key: Any, embed: Tree, carry: Tree, head: Tree) -> None:
    """Checks what the parts of a model make, before it is stored.

    Args:
        model: The model.
        key: A key.
        embed: The embedding's parameters, arrays or shapes.
        carry: What the embedding hands on, arrays or shapes.
        head: The head's parameters, tied leaves too.

    Raises:
        PartitionError: What passes from block to block is nothing, or random keys; blocks of a kind have different
            parameters; or a tie joins leaves that are not alike, or not there.
    """
    check_passed(carry)
    blocks = _one_of_each(model, key, carry)
    for user, source in model.tie.items():
        _check_tie(user, source, {"embed": embed, "head": head, "blocks": blocks})


def check_passed(carry: Tree) -> None:
    """Raises PartitionError unless what passes from block to block is arrays of numbers.

    Args:
        carry: What the embedding hands on, arrays or shapes.
    """
    if not jax.tree.leaves(carry):
        raise PartitionError(
            "embed.apply returns no array but must return what the first block is given; try [rows, …]"
        )
    for path, leaf in jax.tree.leaves_with_path(carry):
        if jnp.issubdtype(getattr(leaf, "dtype", float), jax.dtypes.extended):
            raise PartitionError(
                f"carry{jax.tree_util.keystr(path)} is {_text(leaf)} but what passes from block to block must be "
                "numbers; try the key that embed, blocks and head are given as their last argument"
            )


def _one_of_each(model: Model, key: Any, carry: Tree) -> dict[str, Tree]:
    """Shapes of the parameters of one block of each kind, tied leaves too."""
    made: dict[Callable, Tree] = {}
    first: dict[str, tuple[int, Tree]] = {}
    for number, block in enumerate(model.blocks):
        if block.init not in made:
            made[block.init] = jax.eval_shape(block.init, key, carry)
        own = made[block.init]
        other, wanted = first.setdefault(block.kind, (number, own))
        if found := _difference(wanted, own):
            raise PartitionError(
                f"blocks {other} and {number} are of kind={block.kind!r} but have different parameters: {found}; "
                f"try kind='{block.kind}{number}' for block {number}"
            )
    return {kind: shapes for kind, (_, shapes) in first.items()}


def _difference(a: Tree, b: Tree) -> str:
    """The first leaf in which two trees of shapes differ, in words; empty if they are alike."""
    one, two = ({slashed(path): _text(leaf) for path, leaf in jax.tree.leaves_with_path(tree)} for tree in (a, b))
    for name in dict.fromkeys([*one, *two]):
        if one.get(name) != two.get(name):
            return f"{name} is {one.get(name, 'missing')} and {two.get(name, 'missing')}"
    return ""


def _check_tie(user: str, source: str, params: Mapping[str, Tree]) -> None:
    """Raises PartitionError unless both ends of a tie are leaves that are alike."""
    depth = 2 if user.startswith("blocks/") else 1
    found = []
    for path, deep in ((user, depth), (source, 1)):
        part, below = "/".join(path.split("/")[:deep]), "/".join(path.split("/")[deep:])
        tree = get_path(params, part)
        leaves = {slashed(at): leaf for at, leaf in jax.tree.leaves_with_path(tree)}
        if below not in leaves:
            near = [f"{part}/{name}" for name in (get_close_matches(below, leaves, n=1, cutoff=0.0) or leaves)]
            raise PartitionError(
                f"tie={{{user!r}: {source!r}}} names {path!r}, but {part} has no leaf {below!r}; try {near[0]!r}"
                if near
                else f"tie={{{user!r}: {source!r}}} names {path!r}, but {part} has no leaf"
            )
        found.append(leaves[below])
    if len({(leaf.shape, leaf.dtype) for leaf in found}) > 1:
        raise PartitionError(
            f"tie={{{user!r}: {source!r}}} joins {_text(found[0])} and {_text(found[1])}, which must be alike; "
            "try leaving it out, or one shape and dtype for both"
        )


class Part(NamedTuple):
    """A function of the model and the shapes that it is called with.

    Attributes:
        name: As the user writes it.
        apply: ``(params, carry, mb, key) -> outputs``.
        params: Shapes.
        carry: Shapes.
    """

    name: str
    apply: Callable[[Tree, Tree, Tree, Any], Tree]
    params: Tree = ()
    carry: Tree = ()


def parts_of(model: Model, embed: Tree, blocks: Mapping[str, Tree], head: Tree, carry: Tree) -> list[Part]:
    """The functions of a model that a step calls.

    Args:
        model: The model.
        embed: Shapes of the embedding's parameters.
        blocks: Shapes of the parameters of one block of each kind, tied leaves too.
        head: Shapes of the head's parameters, tied leaves too.
        carry: Shapes of what passes from block to block; where it is not known yet, empty.
    """
    parts = [Part("embed.apply", lambda p, _, mb, key: model.embed.apply(p, mb, key), embed)]
    for kind, own in blocks.items():
        number, block = next((n, block) for n, block in enumerate(model.blocks) if block.kind == kind)
        parts.append(Part(f"blocks[{number}].apply", block.apply, own, carry))
    # The weight and the metrics of a head are constants for differentiation.
    return [*parts, Part("head_loss.apply", lambda *known: model.head_loss.apply(*known)[0], head, carry)]


@contextmanager
def explained(parts: Callable[[], list[Part]], mb: Tree, trains: bool = False) -> Iterator[None]:
    """Where a model fails in words of JAX's or Python's, says which of its functions is to blame, if that can be told.

    Args:
        parts: The model's functions; asked for only where something failed.
        mb: Shapes of a microbatch.
        trains: Whether they are differentiated.

    Raises:
        ConfigError: A function reads a key that the batch does not have.
        PartitionError: A function can be called but not differentiated.
    """
    try:
        yield
    except JaxpipeError:
        raise
    except Exception as error:
        if trains or isinstance(error, KeyError):
            _blame(parts(), mb, trains, error)
        raise


def _blame(parts: list[Part], mb: Tree, trains: bool, error: Exception) -> None:
    """Raises for the first function that is to blame; returns where one has an error of its own."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    for function in parts:

        def asked(params, carry, mb, key, apply=function.apply):
            return apply(params, carry, _Asked(mb) if isinstance(mb, dict) else mb, key)

        try:
            jax.eval_shape(asked, function.params, function.carry, mb, key)
        except ConfigError as missing:
            raise missing from error
        except Exception:
            return
        try:
            if trains:
                jax.eval_shape(partial(_pulled_back, function.apply), function.params, function.carry, mb, key)
        except Exception as refused:
            reason = (str(refused).strip() or type(refused).__name__).splitlines()[0].rstrip(".")
            raise PartitionError(
                f"{function.name} cannot be differentiated: {reason}; try jax.custom_vjp around it, or Pipeline.loss "
                "without a gradient"
            ) from error


class _Asked(dict):
    """A batch that says what it does not have."""

    def __missing__(self, key: Any):
        raise ConfigError(
            f"the batch has no {key!r}, which the model reads, but {', '.join(map(repr, self)) or 'nothing'}; "
            f"try a batch with {key!r}"
        )


def _pulled_back(apply: Callable, params: Tree, carry: Tree, mb: Tree, key: Any) -> Tree:
    """The gradients that a lane would ask for."""

    def run(params, floating):
        return part(apply(params, join(carry, floating, others), mb, key))[0]

    floating, others = part(carry)
    outs, vjp = jax.vjp(run, params, floating)
    return vjp(outs)


def _text(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"
