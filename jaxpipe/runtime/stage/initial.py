"""Making parameters where they live: each block on its device, embedding and head in shards."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxpipe.runtime.contract import Part, check_new, explained
from jaxpipe.runtime.layout.relayout import Layout, Position
from jaxpipe.runtime.layout.tree import Tree, untie
from jaxpipe.runtime.model import Model
from jaxpipe.runtime.stage import keys
from jaxpipe.runtime.stage.build import check_annotations, check_params


def init_params(model: Model, layout: Layout, key: Any, mb: Tree) -> Tree:
    """The pipeline tree of new parameters, see `jaxpipe.runtime.layout.relayout`.

    Args:
        model: The model.
        layout: Where its blocks live.
        key: A `jax.random` key.
        mb: Shapes of one row group.

    Raises:
        ConfigError: The model reads what the batch does not have.
        PartitionError: A parameter that is not floating-point, or a model that breaks its contract.
    """
    mb = _zeros(mb)
    embed_key, head_key, block_keys = keys.init_keys(key, len(model.blocks))

    def make_whole(mb):
        embed = model.embed.init(embed_key, mb)
        carry = model.embed.apply(embed, mb, None)
        return embed, carry, model.head_loss.init(head_key, carry, mb)

    def make_ends():
        embed, _, head = make_whole(mb)
        return {"embed": embed, "head": untie(head, model.head_tie)}

    with explained(lambda: [Part("init", lambda _, __, mb, ___: make_whole(mb))], mb):
        embed, carry, head = jax.eval_shape(make_whole, mb)
    check_new(model, key, embed, carry, head)
    ends = jax.eval_shape(make_ends)
    for part, tree in ends.items():
        check_annotations(model, layout, part, tree)
    params = jax.jit(make_ends, out_shardings=layout.shardings(ends))()
    make = _block_maker(model, layout, block_keys, _zeros(carry))
    blocks = [
        [make(position, (repeat, p)) for p, position in enumerate(row)] for repeat, row in enumerate(layout.positions)
    ]
    params = {**params, "blocks": blocks}
    check_params(params)
    return params


def _block_maker(model: Model, layout: Layout, block_keys: Any, carry: Tree) -> Callable[..., Tree]:
    """Makes the blocks of a position at ``(repeat, number)``; positions that are made alike are compiled once."""
    compiled = {}
    blocks: dict[str, list[int]] = {}
    for number, kind in enumerate(layout.kinds):
        blocks.setdefault(kind, []).append(number)

    def make(position: Position, at: tuple[int, int]) -> Tree:
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

        def rests(path, leaf):
            where = jax.tree_util.DictKey("blocks"), *map(jax.tree_util.SequenceKey, at), *path
            return NamedSharding(layout.mesh, layout.param_spec(layout.rest(where, leaf.shape)))

        key = position.kind, inits, shape
        if key not in compiled:
            shapes = jax.eval_shape(run, block_keys[jnp.asarray(numbers)], position.real.reshape(-1))
            one = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[position.lead :], s.dtype), shapes)
            check_annotations(model, layout, f"blocks/{position.kind}", one)
            compiled[key] = jax.jit(run, out_shardings=jax.tree.map_with_path(rests, shapes))
        return compiled[key](block_keys[jnp.asarray(numbers)], jnp.asarray(position.real.reshape(-1)))

    return make


def _zeros(shapes: Tree) -> Tree:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
