"""The oracle: the same model with no pipeline, differentiated by JAX as a whole.

It shares nothing with the compiled loop but the model's functions, the row groups and their random keys, so that equal
numbers mean something.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxpipe.errors import ConfigError
from jaxpipe.runtime import keys
from jaxpipe.runtime.model import Model, Tree
from jaxpipe.runtime.tree import tie, untie


def sequential(model: Model, row_groups: int = 1) -> "Sequential":
    """The unpipelined model.

    Args:
        model: The model.
        row_groups: G, into how many groups of consecutive rows the batch is cut. Random keys are per row group: a
            pipeline with M microbatches on D data shards gives the same numbers for ``G = M * D``.

    Raises:
        ConfigError: `row_groups` is below 1.
    """
    if row_groups < 1:
        raise ConfigError(f"row_groups={row_groups} must be at least 1; try 1")
    return Sequential(model, row_groups)


@dataclass(frozen=True)
class Sequential:
    """See `sequential`. Trees are canonical: ``{"embed", "blocks": {kind: leaves [L_kind, ...]}, "head"}``."""

    model: Model
    row_groups: int

    def init(self, key, batch: Tree) -> Tree:
        """Canonical parameters; the same numbers as `Pipeline.init` for the same key.

        Args:
            key: A `jax.random` key.
            batch: Any batch, arrays or shapes, leaves ``[B, ...]``.
        """
        model = self.model
        embed_key, head_key, block_keys = keys.init_keys(key, len(model.blocks))
        mb = jax.tree.map(lambda x: jnp.zeros((x.shape[0] // self.row_groups, *x.shape[1:]), x.dtype), batch)
        embed = model.embed.init(embed_key, mb)
        carry = model.embed.apply(embed, mb, None)
        layers: dict[str, list] = {}
        for block, block_key in zip(model.blocks, block_keys, strict=True):
            layers.setdefault(block.kind, []).append(block.init(block_key, carry))
        stacked = {kind: jax.tree.map(lambda *x: jnp.stack(x), *trees) for kind, trees in layers.items()}
        head = untie(model.head_loss.init(head_key, carry, mb), model.tie)
        return {"embed": embed, "blocks": stacked, "head": head}

    def loss(self, canonical: Tree, batch: Tree, key=None):
        """The mean loss of the batch: the sum over row groups divided once by the sum of the weights."""
        groups = jax.tree.map(lambda x: x.reshape(self.row_groups, -1, *x.shape[1:]), batch)

        def one_group(totals, group):
            number, mb = group
            loss, weight = self._group_loss(canonical, mb, keys.group_key(key, number))
            return (totals[0] + loss, totals[1] + weight), None

        dtype = jnp.promote_types(jnp.float32, jax.tree.leaves(canonical)[0].dtype)
        zero = jnp.zeros((), dtype)
        (loss, weight), _ = jax.lax.scan(one_group, (zero, zero), (jnp.arange(self.row_groups), groups))
        return loss / weight

    def value_and_grad(self, canonical: Tree, batch: Tree, key=None):
        """The mean loss and its gradient, a canonical tree."""
        return jax.value_and_grad(self.loss)(canonical, batch, key)

    def _group_loss(self, canonical: Tree, mb: Tree, group):
        model = self.model
        carry = model.embed.apply(canonical["embed"], mb, keys.embed_key(group))
        seen: dict[str, int] = {}
        for number, block in enumerate(model.blocks):
            at = seen.get(block.kind, 0)
            seen[block.kind] = at + 1
            params = jax.tree.map(lambda leaf, at=at: leaf[at], canonical["blocks"][block.kind])
            carry = block.apply(params, carry, mb, keys.block_key(group, number))
        head = tie(canonical["head"], canonical["embed"], model.tie)
        loss, weight = model.head_loss.apply(head, carry, mb, keys.head_key(group, len(model.blocks)))
        return loss, jax.lax.stop_gradient(weight)
