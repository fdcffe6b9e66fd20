"""Embedding and head: gathered once per step, their gradients reduced once.

At rest their leaves are sharded over `pipe` like everything else; only the first and the last stage compute with them,
but every device runs the same program and so holds the gathered copy during a step.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import partial_eval

from jaxpipe.errors import ConfigError
from jaxpipe.runtime.mesh import DATA, PIPE
from jaxpipe.runtime.model import Model, Tree, loss_and_metrics
from jaxpipe.runtime.relayout import sharded_dim
from jaxpipe.runtime.tree import get_path, set_path, tie, untie


@dataclass(frozen=True)
class Ends:
    """Embedding and head of a model on P devices.

    Attributes:
        model: The model.
        devices: P.
        shapes: ``{"embed", "head"}`` with the global shapes, dtypes as the lanes compute with them.
    """

    model: Model
    devices: int
    shapes: Mapping[str, Tree]

    def gather(self, ends: Tree) -> Tree:
        """The whole embedding and head from this device's shards, in the dtypes that the lanes compute with."""

        def gather(leaf, shape):
            dim = sharded_dim(shape.shape, self.devices)
            leaf = leaf.astype(shape.dtype)
            return leaf if dim is None else lax.all_gather(leaf, PIPE, axis=dim, tiled=True)

        return jax.tree.map(gather, ends, dict(self.shapes))

    def reduce(self, gradients: Tree) -> Tree:
        """This device's shards of the summed gradients."""

        def reduce(leaf, shape):
            leaf = lax.psum(leaf, DATA)
            dim = sharded_dim(shape.shape, self.devices)
            if dim is None:
                return lax.psum(leaf, PIPE)
            return lax.psum_scatter(leaf, PIPE, scatter_dimension=dim, tiled=True)

        return jax.tree.map(reduce, gradients, dict(self.shapes))

    def head(self, ends: Tree) -> Tree:
        """The head's parameters, tied leaves put in."""
        return tie(ends["head"], ends["embed"], self.model.head_tie)

    def shared(self, embed: Tree) -> Tree:
        """The leaves of the embedding that blocks use, in their places."""
        kinds = {block.kind for block in self.model.blocks}
        sources = sorted({source for kind in kinds for source in self.model.block_tie(kind).values()})
        found: Tree = {}
        for source in sources:
            found = set_path(found, source, get_path(embed, source))
        return found

    def add_shared(self, accumulators: Tree, gradient: Tree) -> Tree:
        """Adds the gradient of `shared` to the accumulators of embedding and head."""
        return accumulators | {"embed": add_below(accumulators["embed"], gradient)}

    def add_head(self, accumulators: Tree, gradient: Tree) -> Tree:
        """Adds the gradient of `head` to the accumulators of embedding and head."""
        embed = accumulators["embed"]
        for to, source in self.model.head_tie.items():
            tied = accumulate(get_path(embed, source), get_path(gradient, to))
            embed = set_path(embed, source, tied)
        return {"embed": embed, "head": accumulate(accumulators["head"], untie(gradient, self.model.head_tie))}


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
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True])
    if any(used[: len(jax.tree.leaves((head, carry)))]):
        raise ConfigError(
            "head_loss.apply returns a weight that depends on parameters or activations, but where blocks return an "
            "aux loss it must depend on the batch only; try the sum of a mask in mb"
        )


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
