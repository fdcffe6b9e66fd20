"""The program of one device of four, its collectives left out.

``JAX_MOCK_GPU_TOPOLOGY=1x4x1`` lets JAX see three more GPUs than there are, and XLA leave collectives out: what crosses
devices is garbage, but which lanes run follows from the tables, so the time of a device's own work is right. The place
that the real GPU takes is its place in the mesh. Nothing waits for anybody: what is timed is a device's work and what
the loop costs, not hops and not bubbles.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

import jaxpipe as jp
from gpu_parts import llama
from gpu_parts.setting import Setting, failed, filled
from gpu_parts.tick import LLAMA_7B, MICROBATCHES, TOY, batch_shapes, blocks_per_stage, step_shapes
from jaxpipe.schedule import build

DEVICES = 4
PLACES = {"first": 0, "middle": 1, "last": 3}


def run(setting: Setting) -> None:
    """Reports the time of a step for three places, or for P=1 where JAX sees one GPU only."""
    if setting.quick:
        jp.simulate_devices(DEVICES)
    devices = setting.devices(DEVICES)
    if len(devices) < DEVICES:
        found = f"JAX sees {len(devices)} device with JAX_MOCK_GPU_TOPOLOGY: the ring of one device instead"
        setting.row("one of four", found, f"{DEVICES} devices", False)
        _step(setting, devices, "P=1, V=2, a ring onto itself", 2)
        return
    (real, *others) = sorted(devices, key=lambda device: device not in jax.local_devices())
    places = {"first": 0} if setting.quick else PLACES  # simulated devices all run
    for number, (name, place) in enumerate(places.items()):
        try:
            _step(setting, [*others[:place], real, *others[place:]], f"P=4, {name} device", 1, 0.3 + 0.2 * number)
        except Exception as error:
            setting.row(f"P=4, {name} device", failed(error), "runs", False)


def _step(setting: Setting, devices: list, name: str, repeats: int, share: float = 1.0) -> None:
    size = TOY if setting.quick else LLAMA_7B
    microbatches = 4 if setting.quick else MICROBATCHES
    # No axis `tensor`: all that there are are handled by hand, and the fused attention compiles.
    grid = np.asarray(devices).reshape(len(devices), 1, 1)
    mesh = Mesh(grid, ("pipe", "data", "fsdp"), axis_types=(AxisType.Auto,) * 3)
    schedule = build(
        "1f1b" if repeats == 1 else "interleaved_1f1b",
        devices=len(devices),
        microbatches=microbatches,
        repeats=repeats,
    )
    model = llama.model(size, blocks_per_stage(setting) * schedule.stages)
    pipe = jp.Pipeline(model, schedule=schedule, mesh=mesh, remat="full")
    shapes = step_shapes(pipe, batch_shapes(pipe, size))
    program = setting.compile(pipe.value_and_grad, *shapes)
    if not setting.fits(name, program):
        return
    given = jax.tree.map(_placed, shapes)
    times = setting.timed({"step": lambda: program.run(*given)}, 5, share)["step"]
    found = f"{times} a step, {1e3 * times.median / microbatches:.4g} ms a microbatch; {pipe.table.ticks} ticks"
    setting.row(name, found, numbers={**times.numbers(), "ticks": pipe.table.ticks})


def _placed(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of which only the part of the devices that are here is made; a transfer would wait for the others."""
    whole = filled(shape) % 64 if shape.dtype == np.int32 else None

    def part(index):
        if whole is not None:
            return whole[index]
        sizes = [len(range(*own.indices(full))) for own, full in zip(index, shape.shape, strict=True)]
        return filled(jax.ShapeDtypeStruct(sizes, shape.dtype))

    return jax.make_array_from_callback(shape.shape, shape.sharding, part)
