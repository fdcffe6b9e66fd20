"""What is measured: a model with the rows of one microbatch, and the schedules, sizes and options to run it with."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpipe.config import toml
from jaxpipe.config.run import SCHEMA, Config, from_tables
from jaxpipe.errors import JaxpipeError, ScheduleError
from jaxpipe.models.build import gpt_model
from jaxpipe.models.gpt import GPTConfig
from jaxpipe.ops.attention_choice import capability_of
from jaxpipe.runtime.layout.mesh import make_mesh
from jaxpipe.runtime.model import Model
from jaxpipe.runtime.options import stage_counts, stage_remats
from jaxpipe.runtime.pipeline import Pipeline
from jaxpipe.schedule import Costs, Schedule, build
from jaxpipe.schedule.catalog import CATALOG
from jaxpipe.schedule.costs import relative_costs

Remat = Literal["full", "none", "all"]
Idle = Literal["skip", "mask"]

DEFAULT: dict[str, dict[str, Any]] = {
    "model": {"vocab_size": 256, "num_layers": 8, "num_heads": 4, "d_model": 256, "tied": False},
    "schedule": {"microbatches": 1},
    "train": {"seq_len": 128, "batch_size": 2},
}
"""The model of the README's table, as the sections of a config; a microbatch has 2 rows."""


@dataclass(frozen=True)
class Workload:
    """A model and the size of one microbatch.

    Attributes:
        config: The model.
        seq_len: Tokens per row.
        rows: Rows per microbatch.
    """

    config: GPTConfig
    seq_len: int
    rows: int

    @property
    def attention(self) -> str:
        """Which attention it takes, and why."""
        return str(self.config.attention_for(self.seq_len, capability_of(jax.devices()[0])))

    def model(self) -> Model:
        """The model for a pipeline."""
        return gpt_model(self.config)

    def batch(self, microbatches: int) -> dict[str, np.ndarray]:
        """Random tokens and targets, always the same, [microbatches * rows, seq_len]."""
        rng = np.random.default_rng(0)
        shape = (microbatches * self.rows, self.seq_len)
        return {name: rng.integers(0, self.config.vocab_size, shape, dtype=np.int32) for name in ("tokens", "targets")}

    def __str__(self) -> str:
        c = self.config
        return f"gpt d={c.d_model} L={c.num_layers} T={self.seq_len} rows={self.rows}"


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        workload: Model and microbatch.
        schedule: What runs.
        remat: What forwards keep, see `Pipeline`.
        idle: How lanes are idle, see `Pipeline`.
    """

    workload: Workload
    schedule: Schedule
    remat: Remat = "full"
    idle: Idle = "skip"

    @property
    def costs(self) -> Costs:
        """The times by which `Pipeline` chooses the packing."""
        stages = self.schedule.stages
        counts = stage_counts(None, self.workload.config.num_layers, self.schedule)
        return relative_costs(counts, stage_remats(self.remat, stages), self.schedule)

    def pipeline(self, mesh: Mesh | None = None) -> Pipeline:
        """Model and schedule on a mesh of as many devices, by default the first that there are."""
        mesh = mesh or make_mesh(pipe=self.schedule.devices)
        return Pipeline(self.workload.model(), schedule=self.schedule, mesh=mesh, remat=self.remat, idle=self.idle)


def workload_of(config: Config | None = None, overrides: Sequence[str] = ()) -> Workload:
    """The model and the microbatch of a training run, or of the README's table.

    Args:
        config: The run.
        overrides: ``section.key=value`` on top of the README's model; not with `config`, which has its own.

    Raises:
        ConfigError: See `jaxpipe.config.run`.
    """
    if config is None:
        config = from_tables(toml.override(DEFAULT, overrides, SCHEMA))
    rows = config.train.batch_size // (config.schedule.microbatches * config.mesh.data * config.mesh.fsdp)
    return Workload(config.model, config.train.seq_len, rows)


def make_cases(
    workload: Workload,
    *,
    schedules: Sequence[str] | None = None,
    devices: Sequence[int],
    repeats: Sequence[int] | None = None,
    microbatches: Sequence[int],
    remats: Sequence[Remat],
    idles: Sequence[Idle] = ("skip",),
) -> tuple[list[Case], list[str]]:
    """All combinations that there are.

    Args:
        workload: Model and microbatch.
        schedules: Catalogue names; by default `1f1b` for V = 1 and `interleaved_1f1b` for V > 1.
        devices: Values of P.
        repeats: Values of V, for schedules that take any; by default 1 and 2 without names, else each schedule's own.
        microbatches: Values of M.
        remats: Values of `remat`.
        idles: Values of `idle`.

    Returns:
        The cases, and a line for each combination that cannot be, which says why.

    Raises:
        JaxpipeError: None can be.
    """
    cases: list[Case] = []
    left_out: dict[str, JaxpipeError] = {}
    shapes = itertools.product(devices, microbatches, _named(schedules, repeats))
    for num_devices, num_microbatches, (name, num_repeats) in shapes:
        try:
            schedule = build(name, devices=num_devices, microbatches=num_microbatches, repeats=num_repeats)
            stage_counts(None, workload.config.num_layers, schedule)
            if schedule.phases <= {"F"}:
                raise ScheduleError(f"schedule={name!r} has no backward to measure; try '1f1b'")
        except JaxpipeError as error:
            if name not in (*CATALOG, "auto"):
                raise
            shape = f"{name} P={num_devices} M={num_microbatches}" + f" V={num_repeats}" * (num_repeats is not None)
            left_out[shape] = error
            continue
        cases += [Case(workload, schedule, remat, idle) for remat, idle in itertools.product(remats, idles)]
    if not cases:
        raise next(iter(left_out.values()))
    return cases, [f"{shape}: {error}" for shape, error in left_out.items()]


def _named(schedules: Sequence[str] | None, repeats: Sequence[int] | None) -> list[tuple[str, int | None]]:
    """Pairs of a name and its repeats; None where the schedule decides."""
    if schedules is None:
        return [("interleaved_1f1b" if count > 1 else "1f1b", count) for count in repeats or (1, 2)]
    pairs: list[tuple[str, int | None]] = []
    for name in schedules:
        fixed = name not in CATALOG or CATALOG[name].repeats is not None
        pairs += [(name, None)] if fixed or repeats is None else [(name, count) for count in repeats]
    return list(dict.fromkeys(pairs))
