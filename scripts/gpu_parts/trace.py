"""Idle time of one step by cause, from a profiler's trace of it."""

import tempfile
from pathlib import Path

import jax

from gpu_parts.gaps import CAUSES, find_gaps, read_trace
from gpu_parts.setting import Setting
from gpu_parts.tick import LLAMA_7B, MICROBATCHES, TOY, batch_shapes, pipeline, step_arrays, step_shapes

MEANING = {
    "host": "the host reads which branch to take",
    "memory": "copies",
    "collective": "collectives",
    "launch": "from one kernel to the next",
    "else": "unknown",
}


def run(setting: Setting) -> None:
    """Traces the step of `tick` at V=1 that keeps what it can, and reports its gaps."""
    size, microbatches = (TOY, 4) if setting.quick else (LLAMA_7B, MICROBATCHES)
    pipe = pipeline(setting, size, 1, "none", microbatches)
    shapes = step_shapes(pipe, batch_shapes(pipe, size))
    program = setting.compile(pipe.value_and_grad, *shapes)
    if not setting.fits("traced step", program):
        return
    given = step_arrays(pipe, shapes)
    jax.block_until_ready(program.run(*given))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(program.run(*given))
        gaps = find_gaps(read_trace(Path(folder)), on_host=setting.quick)
    found = f"{gaps.busy / gaps.total:.1%} of {gaps.total / 1e3:.4g} ms"
    setting.row("one step, kernels run", found, numbers={"total_us": gaps.total, "busy_us": gaps.busy})
    for cause in CAUSES:
        idle, count = gaps.idle[cause], gaps.counts[cause]
        found = f"{idle / gaps.total:.2%}, {idle / 1e3:.4g} ms in {count} gaps"
        setting.row(f"one step, idle: {MEANING[cause]}", found, numbers={"idle_us": idle, "count": count})
