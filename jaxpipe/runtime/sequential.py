"""The oracle: the same model with no pipeline, differentiated by JAX as a whole.

It shares nothing with the compiled loop but the model's functions, the row groups and their random keys, so that equal
numbers mean something.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.errors import ConfigError, whole_number
from jaxpipe.runtime import keys
from jaxpipe.runtime.contract import Part, check_new, explained
from jaxpipe.runtime.inputs import batch_rows, check_canonical, some_key, typed_key
from jaxpipe.runtime.model import Model, Tree, carry_and_aux, check_model, loss_and_metrics
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
    return Sequential(check_model(model), whole_number("row_groups", row_groups))


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

        Raises:
            ConfigError: No key, a batch that is no tree of arrays, or one that lacks what the model reads.
            PartitionError: A model that breaks its contract.
        """
        model, key, rows = self.model, some_key(key), batch_rows(batch) // self.row_groups
        embed_key, head_key, block_keys = keys.init_keys(key, len(model.blocks))
        mb = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), batch)

        def make_ends(mb):
            embed = model.embed.init(embed_key, mb)
            carry = model.embed.apply(embed, mb, None)
            return embed, carry, model.head_loss.init(head_key, carry, mb)

        with explained(lambda: [Part("init", lambda _, __, mb, ___: make_ends(mb))], mb):
            embed, carry, head = make_ends(mb)
        check_new(model, key, embed, carry, head)
        layers: dict[str, list] = {}
        for block, block_key in zip(model.blocks, block_keys, strict=True):
            params = untie(block.init(block_key, carry), model.block_tie(block.kind))
            layers.setdefault(block.kind, []).append(params)
        stacked = {kind: jax.tree.map(lambda *x: jnp.stack(x), *trees) for kind, trees in layers.items()}
        return {"embed": embed, "blocks": stacked, "head": untie(head, model.head_tie)}

    def loss(self, canonical: Tree, batch: Tree, key=None, *, has_aux: bool = False) -> Any:
        """The mean loss of the batch: the sum over row groups divided once by the sum of the weights, plus aux.

        With `has_aux`, ``(loss, metrics)``.

        Raises:
            ConfigError: A batch that is no tree of arrays, does not divide into row groups or lacks what the model
                reads; or no key.
            PartitionError: A tree that is not canonical, or a model that breaks its contract.
        """
        check_canonical(Counter(block.kind for block in self.model.blocks), canonical)
        rows, key = batch_rows(batch), typed_key(key)
        if rows % self.row_groups:
            near = max(1, round(rows / self.row_groups)) * self.row_groups
            raise ConfigError(f"batch size {rows} must be a multiple of row_groups={self.row_groups}; try {near}")
        dtype = jnp.promote_types(jnp.float32, jax.tree.leaves(canonical)[0].dtype)
        groups = jax.tree.map(lambda x: x.reshape(self.row_groups, -1, *x.shape[1:]), batch)

        def one_group(totals, group):
            number, mb = group
            *sums, metrics = self._group_loss(canonical, mb, keys.group_key(key, number), dtype)
            return tuple(a + b for a, b in zip(totals, sums, strict=True)), metrics

        zero = jnp.zeros((), dtype)
        numbered = jnp.arange(self.row_groups), groups
        first = jax.tree.map(lambda x: x[0], groups)
        with explained(
            lambda: [Part("loss", lambda c, _, mb, __: self._group_loss(c, mb, None, dtype), canonical)], first
        ):
            (loss, weight, aux), metrics = jax.lax.scan(one_group, (zero,) * 3, numbered)
        mean = loss / weight + self.model.aux_weight * aux / self.row_groups
        return (mean, jax.tree.map(_whole_batch, metrics)) if has_aux else mean

    def value_and_grad(self, canonical: Tree, batch: Tree, key=None, *, has_aux: bool = False) -> Any:
        """The mean loss and its gradient, a canonical tree; with `has_aux`, ``((loss, metrics), gradient)``."""
        loss = partial(self.loss, has_aux=has_aux)
        return jax.value_and_grad(loss, has_aux=has_aux)(canonical, batch, key)

    def _group_loss(self, canonical: Tree, mb: Tree, group, dtype) -> tuple[Any, Any, Any, Tree]:
        model = self.model
        carry = model.embed.apply(canonical["embed"], mb, keys.embed_key(group))
        total = jnp.zeros((), dtype)
        for kind, first, numbers in self._runs():
            block, ties = model.blocks[numbers[0]], model.block_tie(kind)
            at = slice(first, first + len(numbers))
            stacked = jax.tree.map(lambda leaf, at=at: leaf[at], canonical["blocks"][kind])

            def one_block(state, layer, block=block, ties=ties):
                carry, total = state
                own, number = layer
                own = tie(own, canonical["embed"], ties)
                carry, aux = carry_and_aux(carry, block.apply(own, carry, mb, keys.block_key(group, number)))
                return (carry, total if aux is None else total + aux.astype(dtype)), None

            (carry, total), _ = jax.lax.scan(one_block, (carry, total), (stacked, jnp.asarray(numbers)))
        head = tie(canonical["head"], canonical["embed"], model.head_tie)
        out = model.head_loss.apply(head, carry, mb, keys.head_key(group, len(model.blocks)))
        loss, weight, metrics = loss_and_metrics(out)
        return loss, jax.lax.stop_gradient(weight), total, metrics

    def _runs(self) -> Iterator[tuple[str, int, list[int]]]:
        """The blocks in runs of one kind: the kind, the place of the first among its kind, and their numbers."""
        kinds = [block.kind for block in self.model.blocks]
        for kind, run in groupby(range(len(kinds)), key=kinds.__getitem__):
            numbers = list(run)
            yield kind, kinds[: numbers[0]].count(kind), numbers


def _whole_batch(metric):
    """A metric ``[groups, rows, ...]`` as ``[B, ...]``; one number per group is summed."""
    return metric.sum(0) if metric.ndim == 1 else metric.reshape(-1, *metric.shape[2:])
