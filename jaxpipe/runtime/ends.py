"""Embedding and head: gathered once per step, their gradients reduced once.

At rest their leaves are sharded over `pipe` like everything else; only the first and the last stage compute with them,
but every device runs the same program and so holds the gathered copy during a step.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.runtime.mesh import DATA, PIPE
from jaxpipe.runtime.model import Model, Tree
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

    def add_head(self, accumulators: Tree, gradient: Tree) -> Tree:
        """Adds the gradient of `head` to the accumulators of embedding and head."""
        embed = accumulators["embed"]
        for to, source in self.model.head_tie.items():
            tied = accumulate(get_path(embed, source), get_path(gradient, to))
            embed = set_path(embed, source, tied)
        return {"embed": embed, "head": accumulate(accumulators["head"], untie(gradient, self.model.head_tie))}


def accumulator_dtype(dtype):
    """float32, or float64 for float64 parameters."""
    return jnp.promote_types(dtype, jnp.float32)


def accumulate(accumulators: Tree, gradients: Tree) -> Tree:
    """The sum, in the accumulators' dtypes."""
    return jax.tree.map(lambda acc, g: acc + g.astype(acc.dtype), accumulators, gradients)
