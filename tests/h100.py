"""Training steps compiled for H100 GPUs on a machine that has none (extra `gpu-aot`); they cannot be run."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import Hop, computations, hlo_text, hops, loop_bodies, typed_copies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxpipe as jp
from jaxpipe.config.run import Config
from jaxpipe.measure.targets import can_compile_for_h100, h100_devices
from jaxpipe.models.build import encdec_model, gpt_model
from jaxpipe.models.encdec_config import EncDecConfig
from jaxpipe.models.gpt import GPTConfig
from jaxpipe.runtime.layout.mesh import AXES, batch_shards
from jaxpipe.runtime.loop.compile import Program
from jaxpipe.runtime.measure.sizes import Share, memory_of
from jaxpipe.runtime.stage.ends import accumulator_dtype
from jaxpipe.schedule import build
from jaxpipe.train.assemble import pipeline, schedule_of
from jaxpipe.train.optim import adamw, learning_rate
from jaxpipe.train.step import TrainState, lower_train_step

MARKS = [
    pytest.mark.gpu_aot,
    pytest.mark.skipif(
        not can_compile_for_h100(),
        reason="the extra gpu-aot (jax-cuda12-plugin, nvidia-cuda-nvcc-cu12) is not installed",
    ),
]

COMPILER: Any = {"xla_backend_optimization_level": 3}
"""What runs in tests is compiled without optimization, see conftest; what users compile is not."""

DEVICES, MICROBATCHES, LENGTH, VOCAB, WIDTH = 4, 8, 96, 384, 256
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "num_heads": 4, "d_model": WIDTH, "dtype": "bfloat16", "tied": False}


@dataclass(frozen=True)
class Step:
    """A compiled training step.

    Attributes:
        pipe: The pipeline.
        program: What is fixed for the shapes.
        text: Its optimized HLO, scheduled.
        parts: The computations of `text`.
        memory: XLA's memory analysis, per device.
    """

    pipe: jp.Pipeline
    program: Program
    text: str
    parts: dict[str, list[str]]
    memory: Any


def mesh(pipe: int = DEVICES, data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of H100s, eight to a node."""
    grid = np.asarray(h100_devices(pipe * data * fsdp * tensor)).reshape(pipe, data, fsdp, tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 4)


def step(
    name: str,
    repeats: int = 1,
    *,
    blocks: int = 2,
    kinds: int = 1,
    axes: dict | None = None,
    sizes: dict | None = None,
    **options: Any,
) -> Step:
    """The step of a small model in bfloat16 with float32 weights, no two sizes of its weights and slots equal.

    Args:
        name: Of a schedule.
        repeats: V.
        blocks: Per stage, where `options` has no `stages`.
        kinds: 1: a GPT; 2: an encoder-decoder, encoder blocks in the first half of the stages.
        axes: Sizes of the mesh's other axes.
        sizes: More options of the GPT.
        options: Of `Pipeline`; `compiler` holds options of XLA.
    """
    compiler: Any = COMPILER | options.pop("compiler", {})
    schedule = build(name, devices=DEVICES, microbatches=MICROBATCHES, repeats=repeats)
    layers = sum(options.get("stages") or [blocks] * schedule.stages)
    if kinds == 1:
        model = gpt_model(GPTConfig(num_layers=layers, max_seq_len=LENGTH, **SIZES, **sizes or {}))
    else:
        half = layers // 2
        model = encdec_model(
            EncDecConfig(num_encoder_layers=half, num_decoder_layers=half, head_dim=64, d_ff=640, **SIZES)
        )
    pipe = jp.Pipeline(model, schedule=schedule, mesh=mesh(**axes or {}), **options)
    rows = 2 * MICROBATCHES * batch_shards(pipe.mesh)
    tokens = jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32, sharding=pipe.batch_sharding)
    batch = {"tokens": tokens, "targets": tokens}
    batch |= {"encoder_tokens": tokens} if kinds == 2 else {}
    params = jax.eval_shape(pipe.init, jax.random.key(0), batch)
    params = placed(params, pipe.layout.shardings(params))
    compiled = jax.jit(pipe.value_and_grad).lower(params, batch).compile(compiler)
    text = hlo_text(compiled)
    return Step(pipe, traced(pipe.program(params, batch)), text, computations(text), memory_of(compiled))


def traced(program: Program) -> Program:
    """A program that knows what its stages keep, as traced for its own devices: attention depends on them."""
    split = "I" in program.table.schedule.phases
    Share.of(program.mesh).trace([branch.stage for branch in program.stages.branches], split)
    return program


@dataclass(frozen=True)
class TrainStep:
    """A run's training step, compiled.

    Attributes:
        config: The run.
        pipe: Its pipeline.
        program: What is fixed for the shapes.
        text: The step's optimized HLO, scheduled.
        parts: The computations of `text`.
        memory: XLA's memory analysis, per device.
    """

    config: Config
    pipe: jp.Pipeline
    program: Program
    text: str
    parts: dict[str, list[str]]
    memory: Any

    @property
    def peak_bytes(self) -> int:
        """What a device holds at most: arguments, results that are not in their place, temporaries."""
        m = self.memory
        return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def train_step(config: Config) -> TrainStep:
    """The step that `jaxpipe train` compiles, with optimizer and donated state, from shapes alone.

    Args:
        config: The run; its mesh is made of H100s.
    """
    sizes, train = config.mesh, config.train
    grid = mesh(sizes.pipe, sizes.data, sizes.fsdp, sizes.tensor)
    pipe = pipeline(config, gpt_model(config.model), schedule_of(config), grid)
    rows = jax.ShapeDtypeStruct((train.batch_size, train.seq_len), jnp.int32, sharding=pipe.batch_sharding)
    batch = {"tokens": rows, "targets": rows}
    tx = pipe.optimizer(adamw(config.optim, steps=train.steps))
    params = jax.eval_shape(pipe.init, jax.random.key(0), batch)
    params = placed(params, pipe.layout.shardings(params))
    init = jax.jit(tx.init).lower(params)
    moments = placed(jax.eval_shape(tx.init, params), init.compile(COMPILER).output_shardings)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(grid, PartitionSpec()))
    rate = learning_rate(config.optim, steps=train.steps)
    compiled = lower_train_step(pipe, tx, TrainState(count, params, moments), batch, rate, None).compile(COMPILER)
    program = traced(pipe.program(params, batch))
    text = hlo_text(compiled)
    return TrainStep(config, pipe, program, text, computations(text), memory_of(compiled))


def steady_hops(step: Step | TrainStep) -> list[Hop]:
    """The hops of the one loop that has those of both lanes."""
    lanes = 4 if step.pipe.schedule.placement == "v" else 2
    (found,) = (found for body in loop_bodies(step.text) if len(found := hops(body)) == lanes)
    return found


def copied_in_loops(step: Step | TrainStep, *, fresh: bool = True) -> list[tuple[str, tuple[int, ...]]]:
    """The dtypes and shapes of weights, stashes and gradient sums that a loop, or a lane in one, copies.

    Args:
        step: Compiled for one device on the axis `tensor`, where shapes are whole.
        fresh: See `typed_copies`.
    """
    stages, slots = step.program.stages, step.pipe.table.slots
    large = [leaf for leaf in jax.tree.leaves((stages.weights, step.program.ends.shapes)) if leaf.ndim > 1]
    known = [(leaf.dtype, leaf.shape) for leaf in large]
    for a in stages.accumulators:
        known += [(accumulator_dtype(leaf.dtype), (a.num_rows, *leaf.shape)) for leaf in jax.tree.leaves(a.params)]
        known += [(accumulator_dtype(leaf.dtype), leaf.shape) for leaf in jax.tree.leaves(a.params) if leaf.ndim > 1]
    kept = [
        (slots.activation, jax.tree.leaves(stages.stage.carry)),
        (slots.residual, stages.residuals.shapes),
        (slots.gradient, stages.stage.gradient),
        (slots.weight_residual, stages.weight_residuals.shapes if slots.weight_residual else ()),
    ]
    known += [(leaf.dtype, (n, *leaf.shape)) for count, leaves in kept for n in (count, count + 1) for leaf in leaves]
    names = {"bfloat16": "bf16", "float32": "f32", "int32": "s32"}
    looked_for = {(names[jnp.dtype(dtype).name], tuple(shape)) for dtype, shape in known}
    bodies = loop_bodies(step.text, inner=True, hopping=False)
    copied = [of for body in bodies for of in typed_copies(body, fresh=fresh)]
    return [of for of in copied if of in looked_for]


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes with shardings."""
    return jax.tree.map(lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), shapes, shardings)


def stage_copies(step: Step | TrainStep, lane: str, steady: bool = False) -> int:
    """How often the code of a stage stands in a program: in each phase once for each choice that devices have.

    Args:
        step: Compiled.
        lane: ``f``, ``b`` or ``w``.
        steady: Count only phases with forwards and backwards.
    """
    inside, table = step.program.ends_inside, step.pipe.table
    found = 0
    for phase in table.phases:
        if steady and not (phase.forward and phase.backward):
            continue
        rows = table.columns[f"{lane}_repeat"][phase.start : phase.stop]
        used = {(repeat, place) for row in rows for place, repeat in enumerate(row) if repeat >= 0}
        last = inside and lane == "f" and phase.head
        found += len(step.program.stages.choices(used, first=inside and lane != "w", last=last).each)
    return found
