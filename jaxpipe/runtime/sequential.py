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
from jaxpipe.runtime.contract import Part, check_new, explained
from jaxpipe.runtime.layout.batch import check_names
from jaxpipe.runtime.layout.inputs import batch_rows, check_canonical, some_key, typed_key
from jaxpipe.runtime.layout.tree import tie, untie
from jaxpipe.runtime.model import Model, Tree, carry_and_aux, check_model, loss_and_metrics, losses_of
from jaxpipe.runtime.stage import keys
from jaxpipe.runtime.stage.ends import accumulator_dtype, summable


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
        check_names(model, batch, whole=False)
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

    def loss(self, canonical: Tree, batch: Tree, key=None, *, has_aux: bool = False, parts: bool = False) -> Any:
        """The mean loss of the batch: the sum over row groups divided once by the sum of the weights, plus aux.

        It is 0 where nothing in the batch counts. With `has_aux`, ``(loss, metrics)``; with `parts`,
        `jaxpipe.runtime.model.Losses` in place of the loss.

        Raises:
            ConfigError: A batch that is no tree of arrays, does not divide into row groups, lacks what the model reads
                or holds what it does not; or no key.
            PartitionError: A tree that is not canonical, or a model that breaks its contract.
        """
        check_canonical(Counter(block.kind for block in self.model.blocks), canonical)
        rows, key = batch_rows(batch), typed_key(key)
        if rows % self.row_groups:
            near = max(1, round(rows / self.row_groups)) * self.row_groups
            raise ConfigError(f"batch size {rows} must be a multiple of row_groups={self.row_groups}; try {near}")
        check_names(self.model, batch)
        groups = jax.tree.map(lambda x: x.reshape(self.row_groups, -1, *x.shape[1:]), batch)
        counts: Counter[str] = Counter()

        def one_group(group):
            number, mb = group
            loss, weight, aux, metrics = self._group_loss(canonical, mb, keys.group_key(key, number), counts)
            return jax.tree.map(_wide, (loss, weight, aux)), summable(metrics)

        first = jax.tree.map(lambda x: x[0], groups)
        with explained(
            lambda: [Part("loss", lambda c, _, mb, __: self._group_loss(c, mb, None, Counter()), canonical)], first
        ):
            sums, metrics = jax.lax.map(one_group, (jnp.arange(self.row_groups), groups))
        loss, weight, aux = jax.tree.map(lambda x: x.sum(0), sums)
        losses = losses_of(self.model, loss, weight, aux, self.row_groups, counts)
        loss = losses if parts else losses.total
        return (loss, jax.tree.map(_whole_batch, metrics)) if has_aux else loss

    def value_and_grad(self, canonical: Tree, batch: Tree, key=None, *, has_aux: bool = False) -> Any:
        """The mean loss and its gradient, a canonical tree; with `has_aux`, ``((loss, metrics), gradient)``."""
        loss = partial(self.loss, has_aux=has_aux)
        return jax.value_and_grad(loss, has_aux=has_aux)(canonical, batch, key)

    def _group_loss(self, canonical: Tree, mb: Tree, group, counts: Counter[str]) -> tuple[Any, Any, dict, Tree]:
        """The sums of a row group; in `counts`, how many blocks return each name of aux."""
        model = self.model
        counts.clear()
        carry = model.embed.apply(canonical["embed"], mb, keys.embed_key(group))
        totals: dict[str, Any] = {}
        for kind, first, numbers in self._runs():
            block, ties = model.blocks[numbers[0]], model.block_tie(kind)
            at = slice(first, first + len(numbers))
            stacked = jax.tree.map(lambda leaf, at=at: leaf[at], canonical["blocks"][kind])

            def one_block(carry, layer, block=block, ties=ties):
                own, number = layer
                own = tie(own, canonical["embed"], ties)
                carry, aux = carry_and_aux(carry, block.apply(own, carry, mb, keys.block_key(group, number)))
                return carry, jax.tree.map(_wide, aux)

            carry, aux = jax.lax.scan(one_block, carry, (stacked, jnp.asarray(numbers)))
            totals |= {name: totals.get(name, 0) + x.sum() for name, x in aux.items()}
            counts.update(dict.fromkeys(aux, len(numbers)))
        head = tie(canonical["head"], canonical["embed"], model.head_tie)
        out = model.head_loss.apply(head, carry, mb, keys.head_key(group, len(model.blocks)))
        loss, weight, metrics = loss_and_metrics(out)
        return loss, jax.lax.stop_gradient(weight), totals, metrics

    def _runs(self) -> Iterator[tuple[str, int, list[int]]]:
        """The blocks in runs of one kind: the kind, the place of the first among its kind, and their numbers."""
        kinds = [block.kind for block in self.model.blocks]
        for kind, run in groupby(range(len(kinds)), key=kinds.__getitem__):
            numbers = list(run)
            yield kind, kinds[: numbers[0]].count(kind), numbers


def _wide(number):
    """A number in the dtype in which such are added up."""
    return jnp.asarray(number, accumulator_dtype(jnp.result_type(number)))


def _whole_batch(metric):
    """A metric ``[groups, rows, ...]`` as ``[B, ...]``; one number per group is summed."""
    return metric.sum(0, dtype=metric.dtype) if metric.ndim == 1 else metric.reshape(-1, *metric.shape[2:])
