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
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxpipe.runtime.ends import Ends
from jaxpipe.runtime.lanes import Lanes
from jaxpipe.runtime.mesh import DATA, PIPE
from jaxpipe.runtime.model import Model, Tree
from jaxpipe.runtime.relayout import Layout
from jaxpipe.runtime.stage import Stage
from jaxpipe.schedule import TickTable


@dataclass(frozen=True)
class Program:
    """Everything that is fixed when the loop is traced.

    Attributes:
        model: The model.
        table: The tick table.
        layout: Where the blocks live.
        mesh: The mesh.
        stage: The lanes of a stage.
        ends: Embedding and head.
    """

    model: Model
    table: TickTable
    layout: Layout
    mesh: Mesh
    stage: Stage
    ends: Ends

    def __call__(self, params: Tree, batch: Tree, key: Any, loop: Callable | None = None) -> tuple[Any, Any, Tree]:
        """Runs the whole microbatch loop.

        Args:
            params: Pipeline parameters.
            batch: Leaves ``[B, ...]``.
            key: A key or None.
            loop: ``(lanes, state) -> state`` in place of the table's loop, for measurements.

        Returns:
            ``(loss_sum, weight, grads)``: global sums, and the gradient of `loss_sum` (None if the table has no
            backwards).
        """
        specs = self.layout.specs(params)
        columns = {name: jnp.asarray(rows, jnp.int32) for name, rows in self.table.columns.items()}
        trains = any(phase.backward for phase in self.table.phases)
        body: Any = jax.shard_map(
            partial(self._device, loop),
            mesh=self.mesh,
            in_specs=(
                PartitionSpec(PIPE),
                PartitionSpec(DATA),
                PartitionSpec(None, PIPE),
                specs,
                PartitionSpec(DATA),
                PartitionSpec(),
            ),
            out_specs=(PartitionSpec(), PartitionSpec(), specs if trains else None),
            axis_names={PIPE, DATA},
            check_vma=False,
        )
        places = (jnp.arange(self.mesh.shape[axis], dtype=jnp.int32) for axis in (PIPE, DATA))
        return body(*places, columns, params, batch, key)

    def _device(self, loop, device, shard, columns: dict, params: Tree, batch: Tree, key):
        """What one device does. Local shapes: device [1], shard [1], columns [ticks, 1], batch [B / data, ...]."""
        columns = {name: column[:, 0] for name, column in columns.items()}
        batch = jax.tree.map(lambda x: x.reshape(self.table.schedule.microbatches, -1, *x.shape[1:]), batch)
        parts = self.model, self.table, self.stage, self.ends, self.layout.per_stage
        loops = self.mesh.devices.flat[0].platform == "cpu"
        lanes = Lanes(*parts, device[0], shard[0], batch, key, *self._weights(params), loops=loops)
        state = lanes.start(params)
        if loop is not None:
            state = loop(lanes, state)
        for phase in self.table.phases if loop is None else ():
            rows = {name: column[phase.start : phase.stop] for name, column in columns.items()}
            state, _ = lax.scan(lambda s, row, phase=phase: (lanes.tick(s, row, phase), None), state, rows)
        axes = (PIPE, DATA)
        loss, weight = lax.psum(state["loss"], axes), lax.psum(state["weight"], axes)
        return loss, weight, self._reduce(state) if "blocks" in state else None

    def _weights(self, params: Tree) -> tuple[list, Tree]:
        """The stages' weights of this device and the gathered ends, in the dtypes that the lanes compute with."""
        blocks = [
            [
                jax.tree.map(lambda x, s: x[0].astype(s.dtype), tree, shapes)
                for tree, shapes in zip(stage, self.stage.params, strict=True)
            ]
            for stage in params["blocks"]
        ]
        return blocks, self.ends.gather({"embed": params["embed"], "head": params["head"]})

    def _reduce(self, state: dict) -> Tree:
        """Local accumulators to gradients: the one reduction per step."""
        repeats = self.table.schedule.repeats
        blocks = [
            jax.tree.map(lambda acc, c=c: lax.psum(acc[None] if repeats == 1 else acc[c][None], DATA), state["blocks"])
            for c in range(repeats)
        ]
        ends = self.ends.reduce(state["ends"])
        return {**ends, "blocks": blocks}
