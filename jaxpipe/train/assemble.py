"""From a config to the parts of a run: tokens, model, mesh, schedule and pipeline, joined here and nowhere else.

What is cheap to get wrong is looked at first; nothing is compiled and no weights exist when this is done.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from jaxpipe.config.keys import in_keys
from jaxpipe.config.run import Config
from jaxpipe.data.batches import Batches
from jaxpipe.data.corpus import open_corpus
from jaxpipe.errors import ScheduleError
from jaxpipe.hosts.share import check_mesh, put_rows
from jaxpipe.measure.planning import Resolved
from jaxpipe.measure.predict import refuse_open, resolved
from jaxpipe.models.build import gpt_model
from jaxpipe.ops.attention_choice import capability_of
from jaxpipe.plan import Plan
from jaxpipe.runtime.layout.mesh import make_mesh, on_cpu, simulate_devices
from jaxpipe.runtime.model import Model
from jaxpipe.runtime.pipeline import Pipeline
from jaxpipe.schedule import Schedule, build, show
from jaxpipe.schedule.stages import format_stages


@dataclass(frozen=True)
class Assembly:
    """The parts of a run.

    Attributes:
        config: What it was made from, with nothing left to the planner.
        pipe: Model, schedule and mesh as one `Pipeline`.
        train: Training batches by index.
        val: Validation batches by index.
        plan: What a step is predicted to take; None where nothing can be predicted.
        attention: Which attention the config's GPT takes and why; empty for another model.
        data_warnings: What is odd about the data.
    """

    config: Config
    pipe: Pipeline
    train: Batches
    val: Batches
    plan: Plan | None = None
    attention: str = ""
    data_warnings: Sequence[str] = ()

    @property
    def on_cpu(self) -> bool:
        """Whether the devices are CPU devices, which share the host's threads."""
        return on_cpu(self.pipe.mesh)

    def put(self, batches: Batches, row: int) -> dict[str, jax.Array]:
        """The batch that begins with a row of `Batches.rows`, on the devices.

        Its rows are spread over data and fsdp; a process reads what its own devices hold.
        """
        size = batches.batch_size

        def read(first: int, stop: int):
            return batches.rows(row + first, stop - first)

        return put_rows(read, size, self.pipe.batch_sharding)

    def timetable_svg(self) -> str:
        """The ticks that the compiled loop runs, drawn."""
        return show.svg(self.pipe.table)

    def describe(self) -> str:
        """The run in a few lines of text."""
        config, pipe = self.config, self.pipe
        kind = pipe.mesh.devices.flat[0].device_kind if not self.on_cpu else "CPU"
        simulated = "simulated " if config.mesh.simulate else ""
        processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
        sizes = " × ".join(f"{name}={size}" for name, size in pipe.mesh.shape.items())
        tokens = [sum(len(segment.ids) for segment in part.segments) for part in (self.train, self.val)]
        layout = f", stages {format_stages(pipe.stages)}" if len(set(pipe.stages)) > 1 else ""
        lines = [
            f"devices    {pipe.mesh.size} × {simulated}{kind}, {sizes}{processes}",
            f"schedule   {config.schedule.name}, repeats={config.schedule.repeats}, "
            f"microbatches={config.schedule.microbatches}{layout}, {pipe.table.packing} packing, "
            f"{pipe.table.ticks} ticks",
            *([f"attention  {self.attention}"] if self.attention else []),
            f"data       {tokens[0]:,} {config.data.unit}s to train on, {tokens[1]:,} to validate on",
        ]
        return "\n".join(lines + [f"warning    {warning}" for warning in (*_warnings(config), *self.data_warnings)])


def _warnings(config: Config) -> list[str]:
    """What is allowed and yet hardly meant."""
    found = []
    if config.model.sequence_parallel and config.mesh.tensor == 1:
        found.append("model.sequence_parallel=true has no effect with mesh.tensor=1; try mesh.tensor=2")
    if config.mesh.shard == "optimizer" and config.mesh.fsdp == 1:
        found.append('mesh.shard="optimizer" has no effect with mesh.fsdp=1; try mesh.fsdp=2')
    if config.model.dtype == "float16" and config.train.loss_scale == 1.0:
        found.append('train.loss_scale=1.0: with model.dtype="float16" gradients below 6e-8 become zero; try 128')
    return found


def assemble(config: Config, model: Model | None = None) -> Assembly:
    """Puts the parts together.

    Args:
        config: The run.
        model: A model in place of the config's GPT.

    Raises:
        DataError: See `jaxpipe.data.corpus` and `jaxpipe.data.batches`.
        ConfigError: The mesh needs more devices than there are.
        ScheduleError: The schedule does not exist in this size, or is none to train with.
        PartitionError: The blocks cannot be spread evenly over the stages.
    """
    if model is not None:
        refuse_open(config)
    schedule = schedule_of(config)
    if schedule.phases <= {"F"}:
        raise ScheduleError(
            f"schedule.name={config.schedule.name!r} must have a backward to train with; try 'interleaved_1f1b'"
        )
    if config.mesh.simulate and not jax.distributed.is_initialized():
        simulate_devices(config.mesh.simulate)
    found = resolved(config) if model is None else Resolved(config, None)
    config, schedule = found.config, schedule if found.config is config else schedule_of(found.config)
    sizes = config.mesh
    mesh = make_mesh(pipe=sizes.pipe, data=sizes.data, fsdp=sizes.fsdp, tensor=sizes.tensor)
    check_mesh(mesh)
    attention = ""
    if model is None:
        capability = capability_of(mesh.devices.flat[0])
        attention = str(config.model.attention_for(config.train.seq_len, capability))
        model = gpt_model(config.model)
    pipe = pipeline(config, model, schedule, mesh)
    vocab_size = config.model.vocab_size
    corpus = open_corpus(config.data, vocab_size=vocab_size)
    shape = {"batch_size": config.train.batch_size, "seq_len": config.train.seq_len, "vocab_size": vocab_size}
    return Assembly(
        config=config,
        pipe=pipe,
        train=Batches(corpus.train, seed=config.train.seed, **shape),
        val=Batches(corpus.val, seed=0, **shape),
        plan=found.plan,
        attention=attention,
        data_warnings=corpus.warnings(config.train.seq_len),
    )


@in_keys()
def pipeline(config: Config, model: Model, schedule: Schedule, mesh: Mesh) -> Pipeline:
    """The pipeline of a config in which nothing is open.

    Args:
        config: The run.
        model: Its model.
        schedule: Its schedule.
        mesh: Devices in its sizes, present or not.
    """
    return Pipeline(
        model,
        schedule=schedule,
        mesh=mesh,
        stages=config.schedule.stages or None,
        remat=config.schedule.remat,
        scan_blocks=config.schedule.scan_blocks,
        head=config.schedule.head,
        idle=config.schedule.idle,
        packing=config.schedule.packing,
        memory=config.schedule.memory,
        second_stream=config.gpu.second_stream,
        shard=config.mesh.shard,
    )


@in_keys()
def schedule_of(config: Config) -> Schedule:
    """The schedule of a config; before the planner has chosen one, any of its size."""
    return build(
        config.schedule.name,
        devices=config.mesh.pipe,
        microbatches=config.schedule.microbatches,
        repeats=None if config.schedule.name == "auto" else config.schedule.repeats,
    )
