"""From tick tables to one program: the loop that every device runs over its own column of the table.

One `shard_map`, manual over `pipe`, `data` and `fsdp`, and over `tensor` where that is one device; inside it one
`lax.scan` per phase of the table. The tick:

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

Before the loop parameters that are cut over `fsdp` are gathered, once (or repeat by repeat, between the loops of its
phases: `jaxpipe.runtime.loop.windows`); after it gradients are reduced, once: where they are cut, to each device's
part. In it nothing crosses `data` or `fsdp`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxpipe.runtime.layout.collect import add_up, gather, reduce
from jaxpipe.runtime.layout.mesh import BATCH, FSDP, MANUAL, PIPE, batch_shards, manual_axes, on_cpu
from jaxpipe.runtime.layout.relayout import Layout
from jaxpipe.runtime.layout.rest import Rest
from jaxpipe.runtime.loop.clock import Clock
from jaxpipe.runtime.loop.device import Device
from jaxpipe.runtime.loop.lane import Skip
from jaxpipe.runtime.loop.tick import start, tick
from jaxpipe.runtime.loop.windows import WIDTH, Window, windows
from jaxpipe.runtime.model import Model, Tree
from jaxpipe.runtime.stage.ends import Ends, batch_weight
from jaxpipe.runtime.stage.stages import Stages
from jaxpipe.schedule import TickTable
from jaxpipe.schedule.lowering.table import Phase


class Outcome(NamedTuple):
    """What a program returns: global sums.

    Attributes:
        loss: Sum of the head's losses.
        weight: Sum of their weights.
        aux: Sums of what the blocks return as aux, by name; empty if they have none.
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
        hops_block: Whether a hop ends before anything else starts, see `jaxpipe.runtime.loop.tick`.
        metrics: Shapes of the head's metrics of one row group; an empty dict if they are not wanted.
        loss_dtype: In which the head's losses and weights are added up.
        offload: Whether the stash rests in the host's memory.
        second_stream: Whether the second of a lane's two hops has a stream of its own, see `Pipeline`.
        clock: What notes when lanes run, if anything does.
        ends_inside: Whether the first stage's lanes hold the embedding and the last one's the head, see `Device`.
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
    loss_dtype: Any = jnp.float32
    offload: bool = False
    second_stream: bool = False
    clock: Clock | None = None
    ends_inside: bool = False

    @property
    def trains(self) -> bool:
        """Whether there are backwards."""
        return any(phase.backward for phase in self.table.phases)

    @property
    def row_groups(self) -> int:
        """Microbatches on all batch shards."""
        return self.table.schedule.microbatches * batch_shards(self.mesh)

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
        layout = self.layout
        rests = layout.rests(params)
        specs = jax.tree.map(lambda rest: layout.param_spec(rest, MANUAL), rests)
        columns = {name: jnp.asarray(rows, jnp.int32) for name, rows in self.table.columns.items()}
        everywhere, rows = PartitionSpec(), PartitionSpec(BATCH)
        body: Any = jax.shard_map(
            partial(self._device, loop),
            mesh=self.mesh,
            in_specs=(PartitionSpec(PIPE), rows, PartitionSpec(None, PIPE), specs, rows, everywhere, everywhere),
            out_specs=Outcome(
                loss=everywhere,
                weight=everywhere,
                aux=everywhere,
                metrics=jax.tree.map(lambda s: rows if s.shape else everywhere, self.metrics),
                gradient=jax.tree.map(lambda rest: rest.spec(MANUAL), rests) if self.trains else None,
            ),
            axis_names=manual_axes(self.mesh),
            check_vma=False,
        )
        places = (jnp.arange(n, dtype=jnp.int32) for n in (self.mesh.shape[PIPE], batch_shards(self.mesh)))
        params = layout.constrain(params, layout.param_spec)
        out = body(*places, columns, params, batch, key, jnp.asarray(loss_scale, self.loss_dtype))
        return out._replace(gradient=layout.constrain(out.gradient, Rest.spec)) if self.trains else out

    def _device(self, loop, place, shard, columns: dict, params: Tree, batch: Tree, key, loss_scale) -> Outcome:
        """What one device does. Local shapes: place [1], shard [1], columns [ticks, 1], batch [B / shards, ...]."""
        columns = {name: column[:, 0] for name, column in columns.items()}
        batch = jax.tree.map(lambda x: x.reshape(self.table.schedule.microbatches, -1, *x.shape[1:]), batch)
        ends = self.ends.gather(params, place[0])
        narrow = self.narrow and loop is None
        device = self.device(
            place=place[0],
            shard=shard[0],
            batch=batch,
            key=key,
            blocks=[None] * self.table.schedule.repeats if narrow else self.weights(params["blocks"]),
            ends=ends,
            seeds=(loss_scale, self._aux_seed(batch, ends) * loss_scale),
        )
        state = start(device)
        if loop is not None:
            state = loop(device, state)
        here = self.windows if loop is None else []
        for window, following in zip_longest(here, here[1:]):
            if narrow:
                state, device = self._gather_for(state, device, params["blocks"], window, following)
            phase = window.phase
            runner = replace(device, ticks=(phase.start, phase.stop))
            rows = {name: column[phase.start : phase.stop] for name, column in columns.items()}
            turn = partial(_turn, runner, phase)
            state, _ = lax.scan(turn, state, rows)
        everywhere = partial(add_up, axes=MANUAL, mesh_is_cpu=on_cpu(self.mesh))
        return Outcome(
            loss=everywhere(state["loss"]),
            weight=everywhere(state["weight"]),
            aux=jax.tree.map(everywhere, state.get("aux", {})),
            metrics=jax.tree.map(self._metric, state["metrics"]) if self.metrics else {},
            gradient=self._reduce(device, state) if self.trains else None,
        )

    @cached_property
    def narrow(self) -> bool:
        """Whether weights are gathered repeat by repeat."""
        cut = self.layout.shard == "params" and self.mesh.shape[FSDP] > 1
        return cut and self.table.schedule.name == "breadth_first" and self.table.schedule.repeats > WIDTH

    @cached_property
    def windows(self) -> list[Window]:
        """The loops, in order."""
        return windows(self.table, self.narrow)

    def _gather_for(
        self, state: dict, device: Device, blocks: Tree, window: Window, following: Window | None
    ) -> tuple[dict, Device]:
        """The device with the weights of a window and, on their way, of the one after it; others are let go.

        A gather waits for the state before the window, lest XLA do all of them at the start of the step.
        """
        wanted = window.repeats | (following.repeats if following else frozenset())
        new = {repeat: blocks[repeat] for repeat in sorted(wanted) if device.blocks[repeat] is None}
        state, new = lax.optimization_barrier((state, new))
        whole = {repeat: self._weights_of(repeat, own) for repeat, own in new.items()}
        kept = [whole.get(c, own) if c in wanted else None for c, own in enumerate(device.blocks)]
        return state, replace(device, blocks=kept)

    def device(self, **known: Any) -> Device:
        """A device that runs this program; `known` are the fields that are arrays of its own."""
        return Device(
            model=self.model,
            table=self.table,
            stages=self.stages,
            parts=self.ends,
            skip=self.skip,
            hops_block=self.hops_block,
            simulated=on_cpu(self.mesh),
            metrics=self.metrics,
            loss_dtype=self.loss_dtype,
            offload=self.offload,
            second_stream=self.second_stream,
            clock=self.clock,
            ends_inside=self.ends_inside,
            **known,
        )

    def _aux_seed(self, batch: Tree, ends: Tree):
        """The gradient of one `aux`: what it adds to the loss, which is yet to be divided by the global weight."""
        if not self.stages.stage.aux or not self.trains:
            return jnp.zeros(())
        weight = batch_weight(self.model, self.ends.head(ends), self.stages.stage.carry, batch)
        return self.model.aux_weight * lax.psum(weight, BATCH) / self.row_groups

    def _metric(self, kept):
        """A metric of the whole local batch, on every device of the pipe; numbers summed over all row groups."""
        if kept.ndim == 0:
            return add_up(kept, MANUAL, on_cpu(self.mesh))
        rows = kept[: self.table.schedule.microbatches]
        return add_up(rows.reshape(-1, *rows.shape[2:]), PIPE, on_cpu(self.mesh))

    def weights(self, blocks: Tree) -> list:
        """The stages' weights of this device, whole, in the dtypes that the lanes compute with."""
        return [self._weights_of(repeat, own) for repeat, own in enumerate(blocks)]

    def _weights_of(self, repeat: int, blocks: Tree) -> Tree:
        axes = (FSDP,) if self.layout.shard == "params" else ()

        def leaf(x, shape, rest):
            return gather(x.astype(shape.dtype), rest, axes)[0]

        return jax.tree.map(leaf, blocks, self.stages.weights[repeat], self.rests[repeat])

    def block_gradients(self, device: Device, sums: list) -> list:
        """The gradient sums of a device's blocks as gradients ``[1, ...]``, summed over batch shards."""
        own = sums if device.branches_commit else self.stages.apart(sums)
        return jax.tree.map(lambda leaf, rest: reduce(leaf[None], rest, self.mesh, BATCH), own, self.rests)

    @cached_property
    def rests(self) -> list:
        """How the gradients of the blocks' weights rest, by repeat and position."""
        devices = self.table.schedule.devices
        shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct((devices, *s.shape), s.dtype), self.stages.weights)
        return self.layout.rests({"blocks": shapes})["blocks"]

    def _reduce(self, device: Device, state: dict) -> Tree:
        """Local accumulators to gradients: the one reduction per step."""
        blocks = self.block_gradients(device, state["blocks"])
        return {**self.ends.reduce(state["ends"], self.mesh), "blocks": blocks}


def _turn(device: Device, phase: Phase, state: dict, row: dict) -> tuple[dict, None]:
    return tick(device, state, row, phase), None
