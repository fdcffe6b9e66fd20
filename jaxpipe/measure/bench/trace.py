"""When the lanes of one step really ran, beside when the tick table says they would."""

from collections import defaultdict
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpipe.measure.bench.case import Case
from jaxpipe.plan.device import num_cores
from jaxpipe.runtime.layout.mesh import MANUAL
from jaxpipe.runtime.loop.clock import Clock, Note
from jaxpipe.schedule import Action, Costs, Interval, Schedule, TickTable, Timing
from jaxpipe.schedule.lowering.lockstep import run_lanes
from jaxpipe.schedule.lowering.pack import Packed
from jaxpipe.schedule.lowering.timing import timing_of
from jaxpipe.schedule.show import Timeline, timed

MS = 1e-6
"""Milliseconds per nanosecond."""


@dataclass(frozen=True)
class Trace:
    """One step of a case; times in milliseconds from the first start.

    Attributes:
        case: What ran.
        schedule: The order that ran.
        measured: When each action ran.
        simulated: The same ticks, each as long as its slowest device, with the measured mean of every stage and phase
            for its time.
        cores: The cores that the devices had.
    """

    case: Case
    schedule: Schedule
    measured: Timing
    simulated: Timing
    cores: int

    @property
    def shares_cores(self) -> bool:
        """Whether there are fewer cores than devices: lanes then slow each other down."""
        return self.schedule.devices > self.cores

    def spans(self) -> dict[str, list[float]]:
        """By phase, the time of each action."""
        found: dict[str, list[float]] = defaultdict(list)
        for row in self.measured.busy:
            for start, end, action in row:
                found[action.phase].append(end - start)
        return {phase: found[phase] for phase in "FBIW" if phase in found}

    def timelines(self) -> list[Timeline]:
        """Measured above simulated, for the drawers of `jaxpipe.schedule.show`."""
        devices, shared = self.schedule.devices, ", which they share" if self.shares_cores else ""
        machine = f"{devices} simulated devices on {self.cores} cores{shared}"
        notes = f"in ms, remat {self.case.remat}, {machine}", "in ms, lockstep with the measured mean times"
        return [
            timed(self.schedule, timing, note, heading)
            for timing, note, heading in zip(
                (self.measured, self.simulated), notes, ("measured", "simulated"), strict=True
            )
        ]


def trace(case: Case) -> Trace:
    """Compiles a case with a clock, warms up, and notes one step."""
    schedule, clock = case.schedule, Clock()
    pipe = case.pipeline(pipe_mesh(schedule.devices))
    batch = jax.device_put(case.workload.batch(schedule.microbatches), pipe.batch_sharding)
    params = pipe.init(jax.random.key(0), batch)
    program = replace(pipe.program(params, batch), clock=clock)
    step = jax.jit(lambda params, batch: program(params, batch, None))
    for _ in range(2):
        clock.notes.clear()
        jax.block_until_ready(step(params, batch))
        jax.effects_barrier()
    table = pipe.table
    measured = timing_of(table.schedule, intervals(clock.notes, table.schedule), {}, (), 1.0)
    packed, costs = _packed(table), mean_costs(measured, table.schedule)
    simulated = timing_of(table.schedule, *run_lanes(packed, costs, local=False), 1.0)
    return Trace(case, table.schedule, measured, simulated, num_cores())


def pipe_mesh(devices: int) -> Mesh:
    """A mesh of the first devices that a callback can tell apart: with no axis that is left to the compiler."""
    return Mesh(np.asarray(jax.devices()[:devices]).reshape(-1, 1, 1), MANUAL)


def intervals(notes: list[Note], schedule: Schedule) -> list[list[Interval]]:
    """The actions of every device at their times, in ms.

    The head belongs to the last stage's forward and the embedding's gradient to the first stage's backward.
    """
    spans: dict[Action, list[int]] = {}
    devices: list[list[Action]] = [[] for _ in range(schedule.devices)]
    backwards: dict[int, Action] = {}
    for note in sorted(notes):
        stage: int = schedule.stage_at(note.place, note.repeat)
        if note.lane == "head":
            action = Action(stage, "F", note.microbatch)
        elif note.lane == "embed":
            action = backwards[note.microbatch]
        else:
            action = Action(stage, note.lane, note.microbatch)  # pyright: ignore[reportArgumentType]
        if action not in spans:
            spans[action] = [note.time_ns, note.time_ns]
            devices[note.place].append(action)
            if stage == 0 and action.phase in "BI":
                backwards[note.microbatch] = action
        if note.ends:
            spans[action][1] = note.time_ns
    first = min(start for start, _ in spans.values())
    times = {action: [(t - first) * MS for t in span] for action, span in spans.items()}
    return [[Interval(times[a][0], times[a][1], a) for a in actions] for actions in devices]


def mean_costs(timing: Timing, schedule: Schedule) -> Costs:
    """The mean time of every stage and phase; a B that has no I and W beside it counts as both halves."""
    spans: dict[tuple[int, str], list[float]] = defaultdict(list)
    for row in timing.busy:
        for start, end, action in row:
            spans[action.stage, action.phase].append(end - start)
    mean = {key: fmean(values) for key, values in spans.items()}
    stages = range(schedule.stages)
    halves: Any = [
        (mean[s, "I"], mean[s, "W"]) if (s, "I") in mean else (mean.get((s, "B"), 0.0) / 2,) * 2 for s in stages
    ]
    return Costs([mean[s, "F"] for s in stages], [i for i, _ in halves], [w for _, w in halves])


def _packed(table: TickTable) -> Packed:
    """The ticks of the table's actions, as the time models take them."""
    places = {
        action: tick
        for tick in range(table.ticks)
        for device in range(table.schedule.devices)
        for action in table.actions(tick, device)
    }
    rows = tuple([places[action] for action in actions] for actions in table.schedule.order)
    return Packed(table.schedule, table.packing, rows)  # pyright: ignore[reportArgumentType]
