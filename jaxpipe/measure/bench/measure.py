"""The measurement of one case, and the line of numbers that comes of it."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import jax

from jaxpipe.measure.bench.case import Case
from jaxpipe.measure.bench.lanes import lanes_only
from jaxpipe.measure.bench.one_core import OneCore
from jaxpipe.plan.device import num_cores
from jaxpipe.runtime.measure.arithmetic import arithmetic_ratio
from jaxpipe.runtime.measure.sizes import memory_of
from jaxpipe.runtime.measure.traffic import traffic
from jaxpipe.schedule import simulate


@dataclass(frozen=True)
class Row:
    """One line of the table; times in seconds, medians. Ratios are medians too, of those of the rounds: in a round all
    is timed at one speed of the machine.

    Attributes:
        case: The model in a few words.
        schedule: Its name.
        P: Devices.
        V: Stages per device.
        M: Microbatches.
        remat: What forwards keep.
        idle: How lanes are idle.
        ticks: Ticks of the loop.
        step_s: The step.
        t_dev_s: The lanes alone.
        t1_s: The step without a pipeline on one core.
        limit_s: What the step could be at best.
        ratio_to_limit: The step over its limit.
        t_dev_ratio: T_dev · min(P, cores) / T1: how much the devices are in each other's way.
        speedup: T1 over the step.
        cpu_s: CPU seconds of the step, all threads.
        t_dev_cpu_s: CPU seconds of the lanes alone.
        temp_bytes: The compiled step's temporaries per device.
        planned_bytes: What the tick table plans for them.
        arithmetic: What is executed over what the model needs.
        moved_bytes: What a tick of the longest loop copies, stashes and fetches per device, see
            `jaxpipe.runtime.measure.traffic`.
        compile_s: Compile time of the step.
    """

    case: str
    schedule: str
    P: int
    V: int
    M: int
    remat: str
    idle: str
    ticks: int
    step_s: float
    t_dev_s: float
    t1_s: float
    limit_s: float
    ratio_to_limit: float
    t_dev_ratio: float
    speedup: float
    cpu_s: float
    t_dev_cpu_s: float
    temp_bytes: int
    planned_bytes: int
    arithmetic: float
    moved_bytes: int
    compile_s: float


def measure(case: Case, single: OneCore, rounds: int) -> Row:
    """Compiles and times one case.

    Args:
        case: What to run, on devices that exist.
        single: The process that times T1.
        rounds: How often each thing is timed, after one run to warm up.
    """
    schedule, cores = case.schedule, num_cores()
    pipe = case.pipeline()
    batch = jax.device_put(case.workload.batch(schedule.microbatches), pipe.batch_sharding)
    params = pipe.init(jax.random.key(0), batch)
    lowered = jax.jit(pipe.value_and_grad).lower(params, batch)
    start = time.perf_counter()
    step = lowered.compile()
    compile_s = time.perf_counter() - start
    program = pipe.program(params, batch)
    lanes = jax.jit(lambda p, b: lanes_only(program, p, b)).lower(params, batch).compile()

    times: dict[str, list[float]] = {key: [] for key in ("step", "dev", "one", "cpu", "dev_cpu")}
    for warm in range(rounds + 1):
        one = single.seconds(schedule.microbatches)
        dev, dev_cpu = _time(lanes, params, batch)
        whole, cpu = _time(step, params, batch)
        if warm:
            for key, value in (("step", whole), ("dev", dev), ("one", one), ("cpu", cpu), ("dev_cpu", dev_cpu)):
                times[key].append(value)
    median = {key: statistics.median(values) for key, values in times.items()}
    stretch = lockstep_ratio(case) if schedule.devices <= cores else 1.0

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))

    return Row(
        case=str(case.workload),
        schedule=schedule.name,
        P=schedule.devices,
        V=schedule.repeats,
        M=schedule.microbatches,
        remat=case.remat,
        idle=case.idle,
        ticks=pipe.table.ticks,
        step_s=median["step"],
        t_dev_s=median["dev"],
        t1_s=median["one"],
        limit_s=median["dev"] * stretch,
        ratio_to_limit=ratio("step", "dev") / stretch,
        t_dev_ratio=ratio("dev", "one") * min(schedule.devices, cores),
        speedup=ratio("one", "step"),
        cpu_s=median["cpu"],
        t_dev_cpu_s=median["dev_cpu"],
        temp_bytes=memory_of(step).temp_size_in_bytes,
        planned_bytes=sum(pipe.table.bytes(pipe.sizes(batch)).values()),
        arithmetic=arithmetic_ratio(pipe, params, batch),
        moved_bytes=_moved_bytes(step),
        compile_s=compile_s,
    )


def lockstep_ratio(case: Case) -> float:
    """Lockstep makespan over the time of a device that never idles, by the costs that the packing was chosen for.

    F, I and W cost 1 each, B 2, and 1 more is added to every B or I with ``remat="full"``.
    """
    timing = simulate(case.schedule, case.costs, "lockstep")
    return 1 / (1 - timing.bubble)


def _moved_bytes(compiled: Any) -> int:
    """Of the loop that turns most often: the steady phase, or where there is none the longest."""
    loops = traffic(compiled.as_text())
    return max(loops, key=lambda loop: loop.turns or 0).total_bytes if loops else 0


def _time(compiled: Any, *args: Any) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    start, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(compiled(*args))
    return time.perf_counter() - start, time.process_time() - cpu
