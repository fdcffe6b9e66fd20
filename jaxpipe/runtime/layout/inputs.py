"""What a caller hands to a pipeline or to the oracle: batches, keys and parameters, checked where they enter."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxpipe.errors import ConfigError, PartitionError
from jaxpipe.runtime.layout.tree import Tree

if TYPE_CHECKING:
    from jaxpipe.runtime.layout.relayout import Layout

PARTS = ("embed", "blocks", "head")


def batch_rows(batch: Tree) -> int:
    """B, the rows that all leaves of a batch have.

    Args:
        batch: Arrays or shapes, leaves ``[B, ...]``.

    Raises:
        ConfigError: A leaf is no array, has no rows or another number of them; or there is none.
    """
    if isinstance(batch, list) and batch and all(isinstance(one, Mapping) for one in batch):
        raise ConfigError(
            f"batch is a list of {len(batch)} batches but must be one whose leaves are [B, …], which the pipeline cuts "
            "into microbatches itself; try jax.tree.map(lambda *x: numpy.concatenate(x), *batch)"
        )
    rows: dict[int, str] = {}
    for path, leaf in jax.tree.leaves_with_path(batch):
        name, shape = f"batch{jax.tree_util.keystr(path)}", getattr(leaf, "shape", ())
        kind = getattr(getattr(leaf, "dtype", None), "kind", "O" if isinstance(leaf, str | bytes) else "f")
        if kind in "OSUMm":
            raise ConfigError(f"{name} is {_named(leaf)} but must be an array of numbers [B, …]; try leaving it out")
        if not shape:
            in_list = any(isinstance(key, jax.tree_util.SequenceKey) for key in path)
            near = "numpy.asarray of the list" if in_list else "one value per row, or a constant of the model"
            raise ConfigError(f"{name} is {_named(leaf)} but must be an array with the rows first, [B, …]; try {near}")
        rows.setdefault(shape[0], name)
    if not rows:
        raise ConfigError("batch holds no array but must have leaves [B, …]; try {'tokens': …, 'targets': …}")
    if len(rows) > 1:
        each = ", ".join(f"{name} has {count}" for count, name in rows.items())
        raise ConfigError(
            f"batch leaves have leading sizes {sorted(map(str, rows))} but must share one ({each}); "
            f"try [{max(rows)}, …] for all"
        )
    return next(iter(rows))


def typed_key(key: Any) -> Any:
    """A key as JAX's new-style ones, so that its uses can be told from other integers; None stays None.

    Raises:
        ConfigError: It is neither one key nor None.
    """
    if key is None:
        return None
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    if dtype is None or shape is None:
        near = f"jax.random.key({key})" if isinstance(key, int) and not isinstance(key, bool) else "jax.random.key(0)"
        raise ConfigError(f"key={str(key)[:40]} must be one key of jax.random, or None for deterministic; try {near}")
    if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        try:
            key = jax.random.wrap_key_data(jnp.asarray(key))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"key={dtype}{list(shape)} must be one key of jax.random, or None for deterministic; "
                "try jax.random.key(0)"
            ) from error
    if key.shape:
        raise ConfigError(
            f"key has shape {list(key.shape)} but must be one key of jax.random; try key[0], or jax.random.key(0)"
        )
    return key


def some_key(key: Any) -> Any:
    """`typed_key` where parameters are made, which needs one.

    Raises:
        ConfigError: It is no key.
    """
    if key is None:
        raise ConfigError("key=None must be a key of jax.random to make parameters with; try jax.random.key(0)")
    return typed_key(key)


def check_parameters(layout: "Layout", params: Any) -> None:
    """Raises PartitionError unless parameters are in the layout of this pipeline.

    Args:
        layout: Where its blocks live.
        params: Arrays or shapes.
    """
    _check_parts(params, "Pipeline.init or from_canonical")
    blocks = params["blocks"]
    if isinstance(blocks, Mapping):
        raise PartitionError(
            f"params is a canonical tree, whose blocks are by kind ({', '.join(map(str, blocks))}), but a pipeline "
            "takes its own; try pipe.from_canonical(params)"
        )
    sizes, own = [len(row) for row in blocks], [len(row) for row in layout.positions]
    if sizes != own:
        raise PartitionError(_of_another(f"{_stages(sizes)} of blocks", _stages(own)))
    for repeat, row in enumerate(layout.positions):
        for place, position in enumerate(row):
            lead = position.real.shape
            for path, leaf in jax.tree.leaves_with_path(blocks[repeat][place]):
                if jnp.shape(leaf)[: len(lead)] != lead:
                    name = f"['blocks'][{repeat}][{place}]{jax.tree_util.keystr(path)}"
                    raise PartitionError(_of_another(f"shape {list(jnp.shape(leaf))} at {name}", f"{[*lead, ...]}"))


def check_canonical(kinds: Mapping[str, int], canonical: Any) -> None:
    """Raises PartitionError unless a tree is canonical and has the blocks of the model.

    Args:
        kinds: How many blocks of each kind the model has.
        canonical: Arrays or shapes.
    """
    _check_parts(canonical, "Pipeline.to_canonical or sequential(model).init")
    blocks = canonical["blocks"]
    if not isinstance(blocks, Mapping):
        raise PartitionError(
            "canonical is a pipeline's tree, whose blocks are by repeat and position, but must have them by kind; "
            "try pipe.to_canonical(params)"
        )
    if sorted(blocks) != sorted(kinds):
        raise PartitionError(f"canonical blocks={sorted(blocks)} must be of the model's kinds; try {sorted(kinds)}")
    for kind, count in kinds.items():
        for leaf in jax.tree.leaves(blocks[kind]):
            if jnp.shape(leaf)[:1] != (count,):
                have = (*jnp.shape(leaf), "no")[0]
                raise PartitionError(
                    f"canonical blocks have {have} layers but the model has {count}; try a model with {have} blocks"
                )


def _check_parts(tree: Any, maker: str) -> None:
    if not isinstance(tree, Mapping) or any(part not in tree for part in PARTS):
        have = f"has the keys {', '.join(map(repr, tree))}" if isinstance(tree, Mapping) else f"is {_kind(tree)}"
        inside = [key for key, below in tree.items() if _has_parts(below)] if isinstance(tree, Mapping) else []
        near = f"its {inside[0]!r}" if inside else f"what {maker} returns"
        raise PartitionError(f"the parameters' tree {have} but must hold 'embed', 'blocks' and 'head'; try {near}")


def _has_parts(tree: Any) -> bool:
    return isinstance(tree, Mapping) and all(part in tree for part in PARTS)


def _named(leaf: Any) -> str:
    """A leaf that is no array of rows, in words."""
    if isinstance(leaf, str | bytes):
        return f"the text {leaf[:40]!r}"
    return f"an array of {leaf.dtype}" if getattr(leaf, "shape", ()) else f"one {_type(leaf)}"


def _type(leaf: Any) -> str:
    return str(getattr(leaf, "dtype", type(leaf).__name__))


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _stages(sizes: list[int]) -> str:
    return f"{' + '.join(map(str, sizes))} positions"


def _of_another(found: str, own: str) -> str:
    return (
        f"params have {found} where this pipeline has {own}: they are of another model, schedule, mesh or stages; "
        "try pipe.from_canonical(other.to_canonical(params))"
    )
