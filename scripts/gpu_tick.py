"""What a tick of a training step of real size moves on H100s, and how often it asks the host; compiled, never run.

    python scripts/gpu_tick.py                               # Llama-7B on 8 GPUs, 1f1b; needs the extra gpu-aot
    python scripts/gpu_tick.py --schedule interleaved_1f1b --repeats 2
    python scripts/gpu_tick.py --forms inside deferred       # only some of the forms

Each form of the lanes (`jaxpipe.runtime.loop.lane`) is compiled in turn: ``inside``, what JAX's present XLA runs if it
passes buffers through conditionals in place; ``branch``, with embedding and head in lanes of their own; ``deferred``,
where what lanes make is added to the sums outside of the conditionals. For each loop of the program come the bytes that
its kernels read and write per turn: outside of the lanes, and in each lane for each branch.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

import jaxpipe as jp
from jaxpipe.measure.targets import h100_devices
from jaxpipe.models.build import gpt_model
from jaxpipe.runtime.layout.mesh import AXES
from jaxpipe.runtime.measure.sizes import memory_of
from jaxpipe.runtime.measure.traffic import Turn, turns_of_loops
from jaxpipe.train import load
from jaxpipe.train.assemble import pipeline, schedule_of

CONFIG = Path(__file__).parents[1] / "configs" / "llama-7b-8gpu.toml"
FORMS: dict[str, dict[str, Any]] = {
    "inside": {"skip": "branch", "ends_inside": True},
    "branch": {"skip": "branch", "ends_inside": False},
    "deferred": {"skip": "deferred", "ends_inside": False},
}


def compile_form(pipe: jp.Pipeline, batch: Any, form: dict[str, Any]) -> tuple[str, int, float]:
    """The text of loss and gradient in a form, its temporaries in bytes, and the CPU seconds of its compilation."""
    params = jax.eval_shape(pipe.init, jax.random.key(0), batch)
    shardings = pipe.layout.shardings(params)
    params = jax.tree.map(lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), params, shardings)
    program = replace(pipe.program(params, batch), **form)
    lowered = jax.jit(lambda params, batch: program(params, batch, None)).lower(params, batch)
    start = time.process_time()
    compiled = lowered.compile()
    seconds = time.process_time() - start
    return compiled.as_text() or "", memory_of(compiled).temp_size_in_bytes, seconds


def row(turn: Turn) -> str:
    """One loop, in GB."""
    lanes = " ".join("[" + " | ".join(f"{size / 1e9:.2f}" for size in branches) + "]" for branches in turn.lanes)
    idle, busiest = (turn.own + sum(map(of, turn.lanes)) for of in (min, max))
    sizes = f"idle {idle / 1e9:6.2f}   busiest {busiest / 1e9:6.2f}   outside {turn.own / 1e9:.2f}"
    return f"  {len(turn.lanes)} stops   {sizes}   {lanes}"


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(CONFIG), help="a run of a GPT, with its mesh")
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--remat", default="full")
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    overrides = [
        f"schedule.name={args.schedule}",
        f"schedule.repeats={args.repeats}",
        f"schedule.remat={args.remat}",
        f"schedule.microbatches={args.microbatches}",
        f"train.batch_size={args.microbatches}",
    ]
    config = load(args.config, overrides)
    sizes = config.mesh
    shape = sizes.pipe, sizes.data, sizes.fsdp, sizes.tensor
    devices = np.asarray(h100_devices(int(np.prod(shape)))).reshape(shape)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    pipe = pipeline(config, gpt_model(config.model), schedule_of(config), mesh)
    tokens = (config.train.batch_size, config.train.seq_len)
    tokens = jax.ShapeDtypeStruct(tokens, jnp.int32, sharding=pipe.batch_sharding)
    batch = {"tokens": tokens, "targets": tokens}
    print(f"jax {jax.__version__}: {args.schedule}, P={sizes.pipe}, V={args.repeats}, remat {args.remat}; GB per tick")
    for name in args.forms:
        text, temporaries, seconds = compile_form(pipe, batch, FORMS[name])
        print(f"{name}: temporaries {temporaries / 1e9:.2f} GB, compiled in {seconds:.1f} CPU seconds")
        for turn in turns_of_loops(text):
            if turn.lanes:
                print(row(turn))


if __name__ == "__main__":
    main()
