"""Making parameters where they live: each block on its device, embedding and head in shards."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxpipe.runtime import keys
from jaxpipe.runtime.build import check_params
from jaxpipe.runtime.mesh import PIPE
from jaxpipe.runtime.model import Model
from jaxpipe.runtime.relayout import Layout, Position
from jaxpipe.runtime.tree import Tree, untie


def init_params(model: Model, layout: Layout, key: Any, mb: Tree) -> Tree:
    """The pipeline tree of new parameters, see `jaxpipe.runtime.relayout`.

    Args:
        model: The model.
        layout: Where its blocks live.
        key: A `jax.random` key.
        mb: Shapes of one row group.

    Raises:
        PartitionError: A parameter that is not floating-point.
    """
    mb = _zeros(mb)
    embed_key, head_key, block_keys = keys.init_keys(key, len(model.blocks))

    def make_ends():
        embed = model.embed.init(embed_key, mb)
        carry = model.embed.apply(embed, mb, None)
        head = untie(model.head_loss.init(head_key, carry, mb), model.head_tie)
        return {"embed": embed, "head": head}, carry

    ends, carry = jax.eval_shape(make_ends)
    shardings = jax.tree.map(lambda s: layout.canonical_sharding(s.shape), ends)
    params = jax.jit(lambda: make_ends()[0], out_shardings=shardings)()
    make = _block_maker(model, layout, block_keys, _zeros(carry))
    params = {**params, "blocks": [[make(position) for position in row] for row in layout.positions]}
    check_params(params)
    return params


def _block_maker(model: Model, layout: Layout, block_keys: Any, carry: Tree) -> Callable[[Position], Tree]:
    """Makes the blocks of a position; positions that are made alike are compiled once."""
    sharding, compiled = NamedSharding(layout.mesh, PartitionSpec(PIPE)), {}
    blocks: dict[str, list[int]] = {}
    for number, kind in enumerate(layout.kinds):
        blocks.setdefault(kind, []).append(number)

    def make(position: Position) -> Tree:
        numbers = [blocks[position.kind][max(row, 0)] for rows in position.rows for row in position.padded(rows, -1)]
        inits = tuple(model.blocks[number].init for number in numbers)
        alike = all(init == inits[0] for init in inits)
        ties, shape = model.block_tie(position.kind), position.real.shape

        def run(keys, real):
            if alike:
                made = jax.vmap(inits[0], in_axes=(0, None))(keys, carry)
            else:
                each = [init(key, carry) for init, key in zip(inits, keys, strict=True)]
                made = jax.tree.map(lambda *x: jnp.stack(x), *each)

            def place(leaf):
                held = jnp.where(real.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, jnp.zeros_like(leaf))
                return held.reshape(*shape, *leaf.shape[1:])

            return jax.tree.map(place, untie(made, ties))

        key = position.kind, inits, shape
        if key not in compiled:
            compiled[key] = jax.jit(run, out_shardings=sharding)
        return compiled[key](block_keys[jnp.asarray(numbers)], jnp.asarray(position.real.reshape(-1)))

    return make


def _zeros(shapes: Tree) -> Tree:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
