"""What travels between blocks, in two kinds of leaves: floating-point ones, which have gradients, and the rest.

Masks, positions and segment ids are integers: they hop forwards like everything else, and nothing comes back for them.
A gradient of a carry is therefore the list of its floating-point leaves.
"""

import jax
import jax.numpy as jnp

from jaxpipe.runtime.model import Tree


def has_gradient(leaf) -> bool:
    """Whether a leaf is floating-point (or complex)."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def part(carry: Tree) -> tuple[list, list]:
    """The leaves with a gradient, and those without."""
    leaves = jax.tree.leaves(carry)
    return [x for x in leaves if has_gradient(x)], [x for x in leaves if not has_gradient(x)]


def join(like: Tree, floating: list, others: list) -> Tree:
    """A carry of the structure of `like` (arrays or shapes) from its two kinds of leaves."""
    leaves, structure = jax.tree.flatten(like)
    sources = iter(floating), iter(others)
    return jax.tree.unflatten(structure, [next(sources[0] if has_gradient(leaf) else sources[1]) for leaf in leaves])
