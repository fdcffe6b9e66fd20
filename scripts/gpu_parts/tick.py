"""The training step on one device against the same without a pipeline: time, share of the peak, memory.

With P=1 a device runs all lanes of every microbatch and there is no hop: what the loop costs is what is left.
"""

import time
from typing import Any

import jax
from gpu_parts import llama
from gpu_parts.setting import Program, Setting, failed, filled, memory_stats, peak_flops

import jaxpipe as jp
from jaxpipe.schedule import build

RATIO_ASKED, SHARE_ASKED, PLAN_ASKED = 1.02, 0.5, 1.2
MICROBATCHES, BLOCKS = 16, 2

LLAMA_7B = llama.Size(width=4096, heads=32, hidden=11008, vocab=32000, length=4096)
TOY = llama.Size(width=32, heads=2, hidden=64, vocab=64, length=16, fused=False)


def run(setting: Setting, repeats: int) -> None:
    """Reports on both remats.

    Args:
        setting: How it runs.
        repeats: V.
    """
    size = TOY if setting.quick else LLAMA_7B
    microbatches = 4 if setting.quick else MICROBATCHES
    given, start = None, time.monotonic()
    for number, remat in enumerate(("full", "none")):
        if number and time.monotonic() + 0.8 * (time.monotonic() - start) > setting.deadline:
            setting.ask(f"V={repeats}, remat {remat}", "no time left", "runs", False)
            return
        pipe = pipeline(setting, size, repeats, remat, microbatches)
        shapes = step_shapes(pipe, size)
        name = f"V={repeats}, remat {remat}"
        ours = setting.compile(pipe.value_and_grad, *shapes)
        plain = setting.compile(llama.plain_step(pipe.model, remat, microbatches), *shapes)
        _memory(setting, name, pipe, shapes, ours)
        if not all([setting.fits(f"{name}, step", ours), setting.fits(f"{name}, plain step", plain)]):
            continue
        given = given or step_arrays(pipe, shapes)
        _times(setting, name, size, pipe, (ours, plain), given, share=0.3 + 0.5 * number)
    if peak := memory_stats().get("peak_bytes_in_use"):
        setting.row(f"V={repeats}, most memory in use", f"{peak / 1e9:.1f} GB", peak_bytes=peak)


def pipeline(setting: Setting, size: llama.Size, repeats: int, remat: Any, microbatches: int, **options) -> jp.Pipeline:
    """The model on one device, two blocks a stage."""
    schedule = build(
        "1f1b" if repeats == 1 else "interleaved_1f1b", devices=1, microbatches=microbatches, repeats=repeats
    )
    model = llama.model(size, BLOCKS * repeats)
    return jp.Pipeline(model, schedule=schedule, mesh=setting.mesh(), remat=remat, **options)


def step_shapes(pipe: jp.Pipeline, size: llama.Size) -> tuple[Any, Any]:
    """Parameters and a batch of one sequence per microbatch, as shapes that say where they lie."""
    batch = llama.batch_shapes(size, pipe.schedule.microbatches, pipe.batch_sharding)
    params = jax.eval_shape(pipe.init, jax.random.key(0), batch)
    placed = jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), params, pipe.layout.shardings(params)
    )
    return placed, batch


def step_arrays(pipe: jp.Pipeline, shapes: tuple[Any, Any]) -> tuple[Any, Any]:
    """The same as arrays."""
    params = pipe.init(jax.random.key(0), shapes[1])
    batch = {name: jax.device_put(filled(s, n) % 64, s.sharding) for n, (name, s) in enumerate(shapes[1].items())}
    return params, batch


def _memory(setting: Setting, name: str, pipe: jp.Pipeline, shapes: Any, ours: Program) -> None:
    try:
        planned = sum(pipe.table.bytes(pipe.sizes(shapes[1])).values())
    except Exception as error:
        setting.row(f"{name}, planned memory", failed(error))
        return
    ratio = ours.temporary / planned
    found = f"{ours.temporary / 1e9:.2f} GB of temporaries, planned {planned / 1e9:.2f}: {ratio:.2f}"
    numbers = {"temporary_bytes": ours.temporary, "planned_bytes": planned}
    setting.ask(f"{name}, memory", found, f"at most {PLAN_ASKED}", ratio <= PLAN_ASKED, **numbers)


def _times(
    setting: Setting, name: str, size: llama.Size, pipe: jp.Pipeline, programs: Any, given: Any, share: float
) -> None:
    ours, plain = programs
    times = setting.timed({"ours": lambda: ours.run(*given), "plain": lambda: plain.run(*given)}, 7, share)
    ratio = times["ours"].median / times["plain"].median
    found = f"{times['ours']} over {times['plain']}: {ratio:.3f}"
    numbers = {own: each.numbers() for own, each in times.items()}
    setting.ask(
        f"{name}, step over plain", found, f"at most {RATIO_ASKED}", ratio <= RATIO_ASKED, ratio=ratio, **numbers
    )
    flops, peak = size.step_flops(len(pipe.model.blocks), pipe.schedule.microbatches), peak_flops()
    if setting.quick or peak is None:
        return
    shares = {own: flops / each.median / peak for own, each in times.items()}
    found = ", ".join(f"{own} {value:.1%}" for own, value in shares.items())
    held = min(shares.values()) >= SHARE_ASKED
    setting.ask(f"{name}, share of the peak", found, f"at least {SHARE_ASKED:.0%}", held, flops=flops, **shares)
