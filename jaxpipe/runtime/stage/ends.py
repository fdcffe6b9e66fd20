"""Embedding and head: gathered once per step, their gradients reduced once.

At rest their leaves are sharded over `pipe` and `fsdp` like everything else; only the first and the last stage compute
with them, but every device runs the same program and so holds the gathered copy during a step. Leaves that are cut by
vocabulary (``head="vocab_parallel"``) stay cut, and all devices compute with their rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from jaxpipe.errors import ConfigError
from jaxpipe.jax_internals import dce_jaxpr
from jaxpipe.runtime.layout.collect import gather, reduce
from jaxpipe.runtime.layout.mesh import BATCH, FSDP, MANUAL, PIPE
from jaxpipe.runtime.layout.relayout import Shard
from jaxpipe.runtime.layout.tree import drop_path, get_path, set_path, tie, untie
from jaxpipe.runtime.model import Model, Tree, loss_and_metrics
from jaxpipe.runtime.stage.vocab import give_rows, rows_per_device, take_rows


@dataclass(frozen=True)
class Ends:
    """Embedding and head of a model on P devices.

    Attributes:
        model: The model.
        devices: P.
        shapes: ``{"embed", "head"}`` with the global shapes, dtypes as the lanes compute with them.
        rests: How the gradients of the leaves rest, a tree like `shapes`.
        shard: Whether parameters are cut over `fsdp` too, see `Pipeline`.
        cut: Leaves ``[V, D]`` that stay cut by vocabulary: ``{"embed": path, "head": path}``, or some of these.
    """

    model: Model
    devices: int
    shapes: Mapping[str, Tree]
    rests: Mapping[str, Tree]
    shard: Shard = "params"
    cut: Mapping[str, str] = field(default_factory=dict)

    @property
    def local(self) -> Tree:
        """Shapes of what one device holds during a step."""

        def rows(shape):
            return jax.ShapeDtypeStruct((rows_per_device(shape.shape[0], self.devices), *shape.shape[1:]), shape.dtype)

        return self._map(lambda shape: shape, rows, self.shapes)

    @property
    def moved(self) -> list[tuple]:
        """Shapes of those of `local` that are not already there, each with how it rests."""
        cut = self._map(lambda _: False, lambda _: True, self.shapes)
        leaves = zip(*map(jax.tree.leaves, (cut, self.rests, self.local)), strict=True)
        return [(held, rest) for is_cut, rest, held in leaves if not is_cut or rest.pipe != 0 or rest.fsdp is not None]

    @property
    def vocab_size(self) -> int:
        """V of the leaves that are cut."""
        part, path = next(iter(self.cut.items()))
        return get_path(self.shapes[part], path).shape[0]

    def gather(self, ends: Tree, place) -> Tree:
        """What a step needs of embedding and head from this device's shards, in the dtypes that the lanes compute with.

        Args:
            ends: Shards.
            place: This device's place on the pipe.
        """
        stored = (FSDP,) if self.shard == "params" else ()

        def whole(shape, rest, leaf):
            return gather(leaf.astype(shape.dtype), rest, (*stored, PIPE))

        def rows(shape, rest, leaf):
            leaf = gather(leaf.astype(shape.dtype), rest, stored)
            return take_rows(leaf, rest.pipe, shape.shape, self.devices, place)

        return self._map(whole, rows, self.shapes, self.rests, ends)

    def reduce(self, gradients: Tree, mesh: Mesh) -> Tree:
        """This device's shards of the summed gradients."""

        def whole(shape, rest, leaf):
            return reduce(leaf, rest, mesh, MANUAL)

        def rows(shape, rest, leaf):
            return reduce(give_rows(leaf, rest.pipe, shape.shape, self.devices), rest, mesh, BATCH)

        return self._map(whole, rows, self.shapes, self.rests, gradients)

    def _map(self, whole: Callable, cut: Callable, *trees: Tree) -> Tree:
        """A function of whole leaves, another of those cut by vocabulary."""
        out = {}
        for part in ("embed", "head"):
            each = [tree[part] for tree in trees]
            path = self.cut.get(part)
            if path is None:
                out[part] = jax.tree.map(whole, *each)
            else:
                rest = jax.tree.map(whole, *(drop_path(tree, path) for tree in each))
                out[part] = set_path(rest, path, cut(*(get_path(tree, path) for tree in each)))
        return out

    def head(self, ends: Tree) -> Tree:
        """The head's parameters, tied leaves put in."""
        return tie(ends["head"], ends["embed"], self.model.head_tie)

    def add_shared(self, accumulators: Tree, gradient: Tree) -> Tree:
        """Adds the gradient of the leaves that blocks use to the accumulators of embedding and head."""
        return accumulators | {"embed": add_below(accumulators["embed"], gradient)}

    def put_head(self, accumulators: Tree, sums: Tree) -> Tree:
        """The accumulators of embedding and head with other sums for those that `head` takes out of them."""
        embed = accumulators["embed"]
        for to, source in self.model.head_tie.items():
            embed = set_path(embed, source, get_path(sums, to))
        return {"embed": embed, "head": untie(sums, self.model.head_tie)}

    def add_head(self, accumulators: Tree, gradient: Tree) -> Tree:
        """Adds the gradient of `head` to the accumulators of embedding and head."""
        embed = accumulators["embed"]
        for to, source in self.model.head_tie.items():
            tied = accumulate(get_path(embed, source), get_path(gradient, to))
            embed = set_path(embed, source, tied)
        return {"embed": embed, "head": accumulate(accumulators["head"], untie(gradient, self.model.head_tie))}


def shared_leaves(model: Model, embed: Tree) -> Tree:
    """The leaves of the embedding that blocks use, in their places.

    Args:
        model: The model.
        embed: The embedding's parameters, arrays or shapes.
    """
    found: Tree = {}
    for kind in dict.fromkeys(block.kind for block in model.blocks):
        for source in model.block_tie(kind).values():
            found = set_path(found, source, get_path(embed, source))
    return found


def batch_weight(model: Model, head: Tree, carry: Tree, batch: Tree):
    """The head's weight summed over microbatches, before there is any carry.

    Args:
        model: Its head's weight must depend on the batch only, see `check_weight`.
        head: Shapes of the head's parameters.
        carry: Shapes.
        batch: Leaves ``[M, rows, ...]``.
    """

    def one(mb):
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (head, carry))
        weight = loss_and_metrics(model.head_loss.apply(*nothing, mb, None))[1]
        return jnp.asarray(weight, jnp.promote_types(jnp.result_type(weight), jnp.float32))

    return lax.map(one, batch).sum()


def check_weight(model: Model, head: Tree, carry: Tree, mb: Tree) -> None:
    """Raises ConfigError unless the head's weight depends on the batch only: `aux` is scaled with it beforehand."""

    def weight(known, mb):
        return loss_and_metrics(model.head_loss.apply(*known, mb, None))[1]

    closed = jax.make_jaxpr(weight)((head, carry), mb)
    _, used = dce_jaxpr(closed.jaxpr, [True])
    if any(used[: len(jax.tree.leaves((head, carry)))]):
        raise ConfigError(
            "head_loss.apply returns a weight that depends on parameters or activations, but where blocks return an "
            "aux loss it must depend on the batch only; try the sum of a mask in mb"
        )


def loss_dtype(model: Model, *known: Any) -> Any:
    """What the head's losses are added up in: float32, or float64 where they are.

    Args:
        model: The model.
        known: Shapes of what the head is called with.
    """
    loss = jax.eval_shape(lambda *known: jnp.asarray(loss_and_metrics(model.head_loss.apply(*known))[0]), *known)
    return accumulator_dtype(loss.dtype)


def metric_shapes(model: Model, head: Tree, carry: Tree, mb: Tree) -> Tree:
    """Shapes of the head's metrics of one row group, numbers in the dtype of their sum.

    Raises:
        ConfigError: There are none, or one has neither a row per row of the microbatch nor no dim at all.
    """

    def metrics(*known):
        return summable(loss_and_metrics(model.head_loss.apply(*known, None))[2])

    shapes = jax.eval_shape(metrics, head, carry, mb)
    rows = jax.tree.leaves(mb)[0].shape[0]
    if not jax.tree.leaves(shapes):
        raise ConfigError(
            "has_aux=True needs metrics but head_loss.apply returns (loss_sum, weight); try (loss_sum, weight, metrics)"
        )
    for path, leaf in jax.tree.leaves_with_path(shapes):
        if leaf.shape[:1] not in ((), (rows,)):
            raise ConfigError(
                f"metrics{jax.tree_util.keystr(path)} has shape {list(leaf.shape)} but must be a number or have the "
                f"microbatch's rows first; try [{rows}, …]"
            )
    return shapes


def summable(metrics: Tree) -> Tree:
    """Metrics of one row group, numbers in the dtype in which those of all are added up."""
    return jax.tree.map(lambda x: jnp.asarray(x, sum_dtype(jnp.result_type(x))) if jnp.ndim(x) == 0 else x, metrics)


def sum_dtype(dtype) -> Any:
    """What numbers are added up in: 32 bits or more, and truth values are counted."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return accumulator_dtype(dtype)
    return dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.int32)


def accumulator_dtype(dtype):
    """float32, or float64 for float64 parameters."""
    return jnp.promote_types(dtype, jnp.float32)


def accumulate(accumulators: Tree, gradients: Tree) -> Tree:
    """The sum, in the accumulators' dtypes."""
    return jax.tree.map(lambda acc, g: acc + g.astype(acc.dtype), accumulators, gradients)


def add_below(accumulators: Tree, gradients: Tree) -> Tree:
    """`accumulate` where `gradients` has some of the keys only."""
    if not isinstance(gradients, Mapping):
        return accumulate(accumulators, gradients)
    return {k: add_below(v, gradients[k]) if k in gradients else v for k, v in accumulators.items()}
