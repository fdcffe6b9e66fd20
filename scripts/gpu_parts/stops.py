"""What a conditional costs: ticks of a few milliseconds with and without.

On a GPU the host reads which branch to take, and the GPU waits. The loop is run as it is (``idle="skip"``), with lanes
that always run (``idle="mask"``; with one device they are hardly ever idle, so both do the same work), and as a plain
scan. The device has two stages, so that every lane chooses: where a lane has one stage and is never idle, XLA may see
that there is nothing to choose.
"""

import re

from gpu_parts import llama
from gpu_parts.setting import Setting
from gpu_parts.tick import TOY, batch_shapes, pipeline, step_arrays, step_shapes

SHORT = llama.Size(width=2048, heads=16, hidden=5504, vocab=2048, length=1024)
"""About 0.6 teraflop a tick."""

MICROBATCHES, STAGES = 32, 2


def run(setting: Setting, command_buffers: str) -> None:
    """Reports on one setting of the command buffers.

    Args:
        setting: How it runs.
        command_buffers: What they are set to, see `jaxpipe.GpuOptions`.
    """
    size = TOY if setting.quick else SHORT
    microbatches = 4 if setting.quick else MICROBATCHES
    skip, mask = (pipeline(setting, size, STAGES, "none", microbatches, idle=idle) for idle in ("skip", "mask"))
    shapes = step_shapes(skip, batch_shapes(skip, size))
    programs = {
        "skip": setting.compile(skip.value_and_grad, *shapes),
        "mask": setting.compile(mask.value_and_grad, *shapes),
        "plain": setting.compile(llama.plain_step(skip.model, "none", microbatches), *shapes),
    }
    stops = {name: count_stops(program.run.as_text()) for name, program in programs.items()}
    name = f"command buffers {command_buffers}"
    setting.row(f"{name}, stops a tick", ", ".join(f"{own} {count}" for own, count in stops.items()), numbers=stops)
    if not all([setting.fits(f"{name}, {own}", program) for own, program in programs.items()]):
        return
    given = step_arrays(skip, shapes)
    runs = {own: lambda program=program: program.run(*given) for own, program in programs.items()}
    times = setting.timed(runs, 9)
    ticks = skip.table.ticks
    for own, each in times.items():
        numbers = {**each.numbers(), "ticks": ticks}
        setting.row(f"{name}, a tick, {own}", f"{1e3 * each.median / ticks:.3f} ms", numbers=numbers)
    for other in ("mask", "plain"):
        extra = stops["skip"] - stops[other]
        cost = 1e6 * (times["skip"].median - times[other].median) / ticks
        found = f"{cost:.1f} µs a tick for {extra} more" + (f", {cost / extra:.1f} each" if extra else "")
        setting.row(f"{name}, stops of skip over {other}", found, numbers={"us_per_tick": cost, "stops": extra})


def count_stops(text: str) -> int:
    """Conditionals, and loops of unknown length, in the body of the microbatch loop of an optimized program.

    Loops of known length do not ask the host. A program of one device has one loop over microbatches.
    """
    conditionals = len(re.findall(r" conditional\(", text))
    loops = [line for line in text.splitlines() if " while(" in line]
    return conditionals + sum("known_trip_count" not in line for line in loops)
