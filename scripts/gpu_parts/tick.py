"""The training step on one device against the same without a pipeline: time, share of the peak, memory.

With P=1 a device runs all lanes of every microbatch and there is no hop: what the loop costs is what is left.
"""

import time
from typing import Any

import jax

import jaxpipe as jp
from gpu_parts import llama
from gpu_parts.setting import Program, Setting, failed, filled, memory_stats, peak_flops
from jaxpipe.schedule import build

RATIO_ASKED, SHARE_ASKED, PLAN_ASKED = 1.02, 0.5, 1.2
MICROBATCHES = 16

LLAMA_7B = llama.Size(width=4096, heads=32, hidden=11008, vocab=32000, length=4096)
TOY = llama.Size(width=32, heads=2, hidden=64, vocab=64, length=16, fused=False)


def run(setting: Setting, repeats: int) -> None:
    """Reports on both remats.

    Args:
        setting: How it runs.
        repeats: V.
    """
    repeats = min(repeats, 2) if setting.quick else repeats
    size = TOY if setting.quick else LLAMA_7B
    microbatches = 4 if setting.quick else MICROBATCHES
    given, start = None, time.monotonic()
    for number, remat in enumerate(("full", "none")):
        if number and time.monotonic() + 0.8 * (time.monotonic() - start) > setting.deadline:
            setting.ask(f"V={repeats}, remat {remat}", "no time left", "runs", False)
            return
        pipe = pipeline(setting, size, repeats, remat, microbatches)
        shapes = step_shapes(pipe, batch_shapes(pipe, size))
        name = f"V={repeats}, remat {remat}"
        ours = setting.compile(pipe.value_and_grad, *shapes)
        plain = setting.compile(llama.plain_step(pipe.model, remat, microbatches), *shapes)
        if setting.fused:
            found = ours.run.as_text().count('custom_call_target="__cudnn$fmha')
            setting.row(f"{name}, fused attention", f"{found} kernels", "some", found > 0, {"kernels": found})
        if all([setting.fits(f"{name}, step", ours), setting.fits(f"{name}, plain step", plain)]):
            given = given or step_arrays(pipe, shapes)
            _times(setting, name, size, pipe, (ours, plain), given, share=0.3 + 0.5 * number)
        _memory(setting, name, pipe, shapes, ours)
    if peak := memory_stats().get("peak_bytes_in_use"):
        setting.row(f"V={repeats}, most memory in use", f"{peak / 1e9:.1f} GB", numbers={"peak_bytes": peak})


def pipeline(setting: Setting, size: llama.Size, repeats: int, remat: Any, microbatches: int, **options) -> jp.Pipeline:
    """The model on one device, `blocks_per_stage` in each of its stages."""
    schedule = build(
        "1f1b" if repeats == 1 else "interleaved_1f1b", devices=1, microbatches=microbatches, repeats=repeats
    )
    model = llama.model(size, blocks_per_stage(setting) * repeats)
    return jp.Pipeline(model, schedule=schedule, mesh=setting.mesh(), remat=remat, **options)


def blocks_per_stage(setting: Setting) -> int:
    """Two; toys have one."""
    return 1 if setting.quick else 2


def step_shapes(pipe: jp.Pipeline, batch: Any) -> tuple[Any, Any]:
    """Parameters, and the batch that is given, as shapes that say where they lie."""
    params = jax.eval_shape(pipe.init, jax.random.key(0), batch)
    placed = jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), params, pipe.layout.shardings(params)
    )
    return placed, batch


def batch_shapes(pipe: jp.Pipeline, size: llama.Size) -> Any:
    """A batch of one sequence per microbatch."""
    return llama.batch_shapes(size, pipe.schedule.microbatches, pipe.batch_sharding)


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
    needs = ours.temporary + ours.outputs  # what is planned has the gradients' sums in it, which are returned here
    ratio = needs / planned
    found = f"{needs / 1e9:.2f} GB beside arguments, planned {planned / 1e9:.2f}: {ratio:.2f}"
    numbers = {"temporary_bytes": ours.temporary, "output_bytes": ours.outputs, "planned_bytes": planned}
    setting.ask(f"{name}, memory", found, f"at most {PLAN_ASKED}", ratio <= PLAN_ASKED, numbers)


def _times(
    setting: Setting, name: str, size: llama.Size, pipe: jp.Pipeline, programs: Any, given: Any, share: float
) -> None:
    ours, plain = programs
    times = setting.timed({"ours": lambda: ours.run(*given), "plain": lambda: plain.run(*given)}, 7, share)
    ratio = times["ours"].median / times["plain"].median
    found = f"{times['ours']} over {times['plain']}: {ratio:.3f}"
    numbers = {own: each.numbers() for own, each in times.items()}
    setting.ask(
        f"{name}, step over plain", found, f"at most {RATIO_ASKED}", ratio <= RATIO_ASKED, {"ratio": ratio, **numbers}
    )
    flops, peak = size.step_flops(len(pipe.model.blocks), pipe.schedule.microbatches), peak_flops()
    if setting.quick or peak is None:
        return
    shares = {own: flops / each.median / peak for own, each in times.items()}
    found = ", ".join(f"{own} {value:.1%}" for own, value in shares.items())
    held = min(shares.values()) >= SHARE_ASKED
    setting.ask(f"{name}, share of the peak", found, f"at least {SHARE_ASKED:.0%}", held, {"flops": flops, **shares})
