"""A whole run as one value: its sections together, read from a TOML file and written back.

A file is read with `jaxpipe.train.load`; `Config.to_toml` writes the same run with every default filled in, those of
the model's preset included.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxpipe.config import toml
from jaxpipe.config.sections import (
    CheckpointConfig,
    DataConfig,
    HealthConfig,
    MeshConfig,
    MetricsConfig,
    OptimConfig,
    SampleConfig,
    ScheduleConfig,
    TrainConfig,
    WatchdogConfig,
)
from jaxpipe.errors import ConfigError
from jaxpipe.models.gpt_config import BYTES, PRESETS, GPTConfig
from jaxpipe.runtime.gpu import GpuOptions


@dataclass(frozen=True)
class Config:
    """A whole run.

    Raises:
        ConfigError: Sections that do not fit together.
    """

    model: GPTConfig
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    gpu: GpuOptions = field(default_factory=GpuOptions)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def __post_init__(self):
        sizes = {"data": self.mesh.data, "fsdp": self.mesh.fsdp}
        sizes = {name: size for name, size in sizes.items() if size > 1 or name == "data"}
        slices = self.schedule.microbatches * math.prod(sizes.values())
        batch = self.train.batch_size
        if batch % slices:
            near = " or ".join(str(size) for size in (batch // slices * slices, (batch // slices + 1) * slices) if size)
            raise ConfigError(
                f"train.batch_size={batch} must be divisible by schedule.microbatches*"
                f"{'*'.join(f'mesh.{name}' for name in sizes)}="
                f"{'*'.join(map(str, (self.schedule.microbatches, *sizes.values())))}={slices}; try {near}"
            )
        longest = self.model.max_seq_len
        if self.train.seq_len > longest:
            raise ConfigError(
                f"train.seq_len={self.train.seq_len} must not exceed model.max_seq_len={longest}; try {longest}"
            )
        if self.data.unit == "byte" and self.model.vocab_size < BYTES:
            raise ConfigError(f"model.vocab_size={self.model.vocab_size} must cover all {BYTES} bytes; try {BYTES}")
        if self.data.source == "tokens" and not self.data.tokenizer and self.sample.length:
            raise ConfigError(
                f'sample.length={self.sample.length} needs text, but data.source="tokens" has none; '
                "try sample.length=0 or data.tokenizer=…"
            )
        if self.health.nonfinite == "rollback" and not self.checkpoint.enabled:
            raise ConfigError('health.nonfinite="rollback" needs checkpoints; try checkpoint.enabled=true')

    def to_toml(self) -> str:
        """The run as TOML text that `load` reads back to an equal value."""
        return toml.write(dataclasses.asdict(self))


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """The checked sections of a TOML file, with `section.key=value` overrides on top.

    The keys `resume` and `init_from` of the section `checkpoint` can be given without it.

    Raises:
        ConfigError: See `jaxpipe.config.toml` and the sections.
    """
    tables = toml.check(toml.read(path), SCHEMA)
    pairs = [f"checkpoint.{pair}" if pair.partition("=")[0] in ("resume", "init_from") else pair for pair in overrides]
    return toml.override(tables, pairs, SCHEMA)


def from_tables(tables: dict[str, dict[str, Any]]) -> Config:
    """Builds a run from checked sections; what a section leaves out takes its default."""
    sections = {name: cls(**tables.get(name, {})) for name, cls in SECTIONS.items()}
    return Config(model=_model(dict(tables.get("model", {})), sections["data"], sections["train"]), **sections)


def _model(table: dict[str, Any], data: DataConfig, train: TrainConfig) -> GPTConfig:
    """The model section: a preset, changed key by key, or a `GPTConfig` whose vocabulary and length follow the data."""
    preset = table.pop("preset", None)
    if preset is not None:
        table = {**dataclasses.asdict(PRESETS[preset]), **table}
    table.setdefault("max_seq_len", train.seq_len)
    if data.unit == "byte":
        table.setdefault("vocab_size", BYTES)
    missing = [
        spec.name
        for spec in dataclasses.fields(GPTConfig)
        if spec.name not in table
        and spec.default is dataclasses.MISSING
        and spec.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"model.{missing[0]} must be set; or name a preset: {', '.join(PRESETS)}")
    try:
        return GPTConfig(**table)
    except ConfigError as error:
        raise ConfigError(f"model.{error}") from error  # its messages start with the field's name


SECTIONS = {
    "data": DataConfig,
    "mesh": MeshConfig,
    "gpu": GpuOptions,
    "schedule": ScheduleConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "sample": SampleConfig,
    "checkpoint": CheckpointConfig,
    "health": HealthConfig,
    "watchdog": WatchdogConfig,
    "metrics": MetricsConfig,
}
"""The class of every section but ``[model]``."""

SCHEMA: toml.Schema = {
    "model": {"preset": Literal[tuple(PRESETS)], **toml.fields_of(GPTConfig)},
    **{name: toml.fields_of(cls) for name, cls in SECTIONS.items()},
}
"""Every section, key and type that a file may hold."""
