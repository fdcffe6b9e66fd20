"""From tick tables to one program: the loop that every device runs over its own column of the table.

One `shard_map`, manual over `pipe` and `data`; inside it one `lax.scan` per phase of the table. The tick:

    rb = hop(dx)            [1] the last backward lane's gradient flies ...
    y  = F lane             ... while the forward lane computes
    fence(rb, y)
    rf = hop(y)             [2] the forward lane's output flies ...
    dy = head, dx = B lane  ... while head and backward lane compute
    fence(rf, dx)
    W lane                  where backwards are split

What a lane makes besides passes its fence too. Otherwise the scheduler hides the hop behind the small updates that come
after the lane and starts it when the lane is done.

Idle lanes skip (`lax.switch`), and permutes stay outside the conditionals.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxpipe.runtime.clock import Clock
from jaxpipe.runtime.device import Device
from jaxpipe.runtime.ends import Ends, batch_weight
from jaxpipe.runtime.lane import Skip
from jaxpipe.runtime.mesh import DATA, PIPE
from jaxpipe.runtime.model import Model, Tree
from jaxpipe.runtime.relayout import Layout
from jaxpipe.runtime.stages import Stages
from jaxpipe.runtime.tick import start, tick
from jaxpipe.schedule import TickTable


class Outcome(NamedTuple):
    """What a program returns: global sums.

    Attributes:
        loss: Sum of the head's losses.
        weight: Sum of their weights.
        aux: Sum of the blocks' aux, None if they have none.
        metrics: The head's metrics for the whole batch.
        gradient: Gradient of `loss` plus what `aux` adds, times the loss scale; None if the table has no backwards.
    """

    loss: Any
    weight: Any
    aux: Any
    metrics: Tree
    gradient: Tree


@dataclass(frozen=True)
class Program:
    """Everything that is fixed when the loop is traced.

    Attributes:
        model: The model.
        table: The tick table.
        layout: Where the blocks live.
        mesh: The mesh.
        stages: The lanes of all stages.
        ends: Embedding and head.
        skip: How lanes are idle.
        hops_block: Whether a hop ends before anything else starts, see `jaxpipe.runtime.tick`.
        metrics: Shapes of the head's metrics of one row group; an empty dict if they are not wanted.
        offload: Whether the stash rests in the host's memory.
        second_stream: Whether the second of a lane's two hops has a stream of its own, see `Pipeline`.
        clock: What notes when lanes run, if anything does.
    """

    model: Model
    table: TickTable
    layout: Layout
    mesh: Mesh
    stages: Stages
    ends: Ends
    skip: Skip
    hops_block: bool = False
    metrics: Tree = field(default_factory=dict)
    offload: bool = False
    second_stream: bool = False
    clock: Clock | None = None

    @property
    def trains(self) -> bool:
        """Whether there are backwards."""
        return any(phase.backward for phase in self.table.phases)

    @property
    def row_groups(self) -> int:
        """Microbatches on all data shards."""
        return self.table.schedule.microbatches * self.mesh.shape[DATA]

    def __call__(
        self, params: Tree, batch: Tree, key: Any, loss_scale: Any = 1.0, loop: Callable | None = None
    ) -> Outcome:
        """Runs the whole microbatch loop.

        Args:
            params: Pipeline parameters.
            batch: Leaves ``[B, ...]``.
            key: A key or None.
            loss_scale: What backwards start from, a scalar.
            loop: ``(device, state) -> state`` in place of the table's loop, for measurements.
        """
        specs = self.layout.specs(params)
        columns = {name: jnp.asarray(rows, jnp.int32) for name, rows in self.table.columns.items()}
        everywhere, rows = PartitionSpec(), PartitionSpec(DATA)
        body: Any = jax.shard_map(
            partial(self._device, loop),
            mesh=self.mesh,
            in_specs=(PartitionSpec(PIPE), rows, PartitionSpec(None, PIPE), specs, rows, everywhere, everywhere),
            out_specs=Outcome(
                loss=everywhere,
                weight=everywhere,
                aux=everywhere if self.stages.stage.aux else None,
                metrics=jax.tree.map(lambda s: rows if s.shape else everywhere, self.metrics),
                gradient=specs if self.trains else None,
            ),
            axis_names={PIPE, DATA},
            check_vma=False,
        )
        places = (jnp.arange(self.mesh.shape[axis], dtype=jnp.int32) for axis in (PIPE, DATA))
        return body(*places, columns, params, batch, key, jnp.asarray(loss_scale, jnp.float32))

    def _device(self, loop, place, shard, columns: dict, params: Tree, batch: Tree, key, loss_scale) -> Outcome:
        """What one device does. Local shapes: place [1], shard [1], columns [ticks, 1], batch [B / data, ...]."""
        columns = {name: column[:, 0] for name, column in columns.items()}
        batch = jax.tree.map(lambda x: x.reshape(self.table.schedule.microbatches, -1, *x.shape[1:]), batch)
        ends = self.ends.gather(params, place[0])
        device = self.device(
            place=place[0],
            shard=shard[0],
            batch=batch,
            key=key,
            blocks=self.weights(params["blocks"]),
            ends=ends,
            seeds=(loss_scale, self._aux_seed(batch, ends) * loss_scale),
        )
        state = start(device, params)
        if loop is not None:
            state = loop(device, state)
        for phase in self.table.phases if loop is None else ():
            rows = {name: column[phase.start : phase.stop] for name, column in columns.items()}
            state, _ = lax.scan(lambda s, row, phase=phase: (tick(device, s, row, phase), None), state, rows)
        everywhere = partial(lax.psum, axis_name=(PIPE, DATA))
        return Outcome(
            loss=everywhere(state["loss"]),
            weight=everywhere(state["weight"]),
            aux=everywhere(state["aux"]) if "aux" in state else None,
            metrics=jax.tree.map(self._metric, state["metrics"]) if self.metrics else {},
            gradient=self._reduce(state) if self.trains else None,
        )

    def device(self, **known: Any) -> Device:
        """A device that runs this program; `known` are the fields that are arrays of its own."""
        return Device(
            model=self.model,
            table=self.table,
            stages=self.stages,
            parts=self.ends,
            skip=self.skip,
            hops_block=self.hops_block,
            metrics=self.metrics,
            offload=self.offload,
            second_stream=self.second_stream,
            clock=self.clock,
            **known,
        )

    def _aux_seed(self, batch: Tree, ends: Tree):
        """The gradient of one `aux`: what it adds to the loss, which is yet to be divided by the global weight."""
        if not self.stages.stage.aux or not self.trains:
            return jnp.zeros(())
        weight = batch_weight(self.model, self.ends.head(ends), self.stages.stage.carry, batch)
        return self.model.aux_weight * lax.psum(weight, DATA) / self.row_groups

    def _metric(self, kept):
        """A metric of the whole local batch, on every device of the pipe; numbers summed over all row groups."""
        if kept.ndim == 0:
            return lax.psum(kept, (PIPE, DATA))
        rows = kept[: self.table.schedule.microbatches]
        return lax.psum(rows.reshape(-1, *rows.shape[2:]), PIPE)

    def weights(self, blocks: Tree) -> list:
        """The stages' weights of this device, in the dtypes that the lanes compute with."""
        return [
            [
                jax.tree.map(lambda x, s: x[0].astype(s.dtype), tree, shapes)
                for tree, shapes in zip(trees, weights, strict=True)
            ]
            for trees, weights in zip(blocks, self.stages.weights, strict=True)
        ]

    def block_gradients(self, accumulators: list) -> list:
        """The accumulators of this device's blocks as gradients ``[1, ...]``, summed over data shards."""

        def of(repeat: int, number: int, weights: Tree) -> Tree:
            accumulator = self.stages.accumulators[number]
            row = accumulator.rows[repeat]

            def leaf(sums, like):
                own = sums if accumulator.num_rows == 1 else sums[row]
                own = own if own.shape == like.shape else own[: like.shape[0]]
                return lax.psum(own[None], DATA)

            return jax.tree.map(leaf, accumulators[number], weights)

        return [
            [of(repeat, number, shapes) for number, shapes in zip(places, weights, strict=True)]
            for repeat, (places, weights) in enumerate(zip(self.stages.places, self.stages.weights, strict=True))
        ]

    def _reduce(self, state: dict) -> Tree:
        """Local accumulators to gradients: the one reduction per step."""
        return {**self.ends.reduce(state["ends"]), "blocks": self.block_gradients(state["blocks"])}
