"""How close the compiled step comes to what the machine can do, on simulated CPU devices.

    python scripts/bench.py                       # the table of the README
    python scripts/bench.py --devices 2 --remat none --json

Three things are timed in turn, round after round, so that the machine's drift falls on all of them:

    step    the compiled training step: loss and gradients of one batch
    T_dev   every device runs its own stages' forwards and backwards for all microbatches at the same time, with
            the same lane functions, but no schedule, no hops and no stash: what the backend can do
    T1      the single-device gradient-accumulation step of the whole model, in a process pinned to one core

    limit   T_dev * (lockstep makespan / ideal time); T_dev where devices share cores (P > cores), for there bubbles
            cost nothing

Reported are medians over the rounds and their ratios.
"""

import argparse
import itertools
import json
import multiprocessing as mp
import os
import statistics
import sys
import time
from dataclasses import dataclass

from bench_case import Case, accumulation_step, gpt, in_groups, random_batch

CASE = Case()


@dataclass(frozen=True)
class Row:
    """One line of the table; times in seconds, medians."""

    case: str
    schedule: str
    P: int
    V: int
    M: int
    remat: str
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
    compile_s: float


def main() -> int:
    """Runs the cases and prints the table."""
    options = _arguments().parse_args()
    cores = len(os.sched_getaffinity(0))
    parent, child = mp.get_context("spawn").Pipe()
    single = mp.get_context("spawn").Process(target=_one_core, args=(child,), daemon=True)
    single.start()
    import jaxpipe as jp

    jp.simulate_devices(max(options.devices))
    rows = []
    cases = itertools.product(options.devices, options.repeats, options.microbatches, options.remat)
    for devices, repeats, microbatches, remat in cases:
        if CASE.num_layers % (devices * repeats):
            continue
        name = options.schedule or ("interleaved_1f1b" if repeats > 1 else "1f1b")
        row = _measure(name, devices, repeats, microbatches, remat, options.rounds, cores, parent)
        rows.append(row)
        if not options.json:
            print(_line(row) if len(rows) > 1 else f"{_head(cores)}\n{_line(row)}", flush=True)
    parent.send("stop")
    single.join()
    if options.json:
        print(json.dumps({"cores": cores, "rows": [vars(row) for row in rows]}, indent=1))
    return 0


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4, 8], help="P")
    parser.add_argument("--repeats", type=int, nargs="+", default=[1, 2], help="V")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[8], help="M")
    parser.add_argument("--remat", nargs="+", default=["full", "none"], choices=["full", "none", "all"])
    parser.add_argument("--schedule", help="catalogue name (default: 1f1b for V = 1, interleaved_1f1b for V > 1)")
    parser.add_argument("--rounds", type=int, default=7, help="how often each thing is timed")
    parser.add_argument("--json", action="store_true")
    return parser


def _one_core(pipe) -> None:
    """The child process: for each number of microbatches that it is sent, times a step on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import jax

    import jaxpipe as jp

    jp.simulate_devices(1)
    params, step = accumulation_step(CASE)
    while (microbatches := pipe.recv()) != "stop":
        groups = in_groups(random_batch(CASE, microbatches), microbatches)
        start = time.perf_counter()
        jax.block_until_ready(step(params, groups))
        pipe.send(time.perf_counter() - start)


def _measure(name, devices, repeats, microbatches, remat, rounds, cores, single) -> Row:
    import jax

    import jaxpipe as jp
    from jaxpipe.runtime.arithmetic import arithmetic_ratio
    from jaxpipe.runtime.sizes import memory_of
    from jaxpipe.schedule import Costs, build
    from jaxpipe.schedule.lockstep import lockstep_makespan
    from jaxpipe.schedule.pack import pack

    schedule = build(name, devices=devices, microbatches=microbatches, repeats=repeats)
    pipe = jp.Pipeline(gpt(CASE), schedule=schedule, mesh=jp.make_mesh(pipe=devices), remat=remat)
    batch = jax.device_put(random_batch(CASE, microbatches), pipe.batch_sharding)
    params = pipe.init(jax.random.key(0), batch)
    lowered = jax.jit(pipe.value_and_grad).lower(params, batch)
    start = time.perf_counter()
    step = lowered.compile()
    compile_s = time.perf_counter() - start
    devices_only = jax.jit(lambda p, b: _lanes_only(pipe, p, b)).lower(params, batch).compile()

    times: dict[str, list[float]] = {key: [] for key in ("step", "dev", "one", "cpu", "dev_cpu")}
    for warm in range(rounds + 1):
        single.send(microbatches)
        one = single.recv()
        dev, dev_cpu = _time(devices_only, params, batch)
        whole, cpu = _time(step, params, batch)
        if warm:
            for key, value in (("step", whole), ("dev", dev), ("one", one), ("cpu", cpu), ("dev_cpu", dev_cpu)):
                times[key].append(value)
    median = {key: statistics.median(values) for key, values in times.items()}

    costs = Costs(recompute=1.0 if remat == "full" else 0.0)
    packed = pack(pipe.table.schedule, pipe.table.packing)  # pyright: ignore[reportArgumentType]
    ideal = lockstep_makespan(packed, costs) if devices <= cores else 0.0
    busy = microbatches * sum(getattr(costs, n) for n in ("forward", "backward_input", "backward_weight", "recompute"))
    limit = median["dev"] * (max(1.0, ideal / busy) if devices <= cores else 1.0)
    return Row(
        case=str(CASE),
        schedule=name,
        P=devices,
        V=repeats,
        M=microbatches,
        remat=remat,
        step_s=median["step"],
        t_dev_s=median["dev"],
        t1_s=median["one"],
        limit_s=limit,
        ratio_to_limit=median["step"] / limit,
        t_dev_ratio=median["dev"] * min(devices, cores) / median["one"],
        speedup=median["one"] / median["step"],
        cpu_s=median["cpu"],
        t_dev_cpu_s=median["dev_cpu"],
        temp_bytes=memory_of(step).temp_size_in_bytes,
        planned_bytes=sum(pipe.table.bytes(pipe.sizes(batch)).values()),
        arithmetic=arithmetic_ratio(pipe, params, batch),
        compile_s=compile_s,
    )


def _time(compiled, *args) -> tuple[float, float]:
    import jax

    start, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(compiled(*args))
    return time.perf_counter() - start, time.process_time() - cpu


def _lanes_only(pipe, params, batch):
    """T_dev as a program: each device runs all its forwards and backwards, one after the other."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    from jaxpipe.runtime.transfer import fence

    program = pipe.program(params, batch)
    stage, schedule = program.stage, pipe.schedule
    split = "I" in schedule.phases

    def device(lanes, state):
        carry = jax.tree.map(lambda s: jnp.full(s.shape, 0.5, s.dtype), stage.carry)

        def microbatch(state_and_x, m):
            state, x = state_and_x
            for repeat in range(schedule.repeats):
                at = jnp.int32(repeat)
                row = {"f_microbatch": m, "b_microbatch": m, "f_repeat": at, "b_repeat": at}
                context = lanes.context(m, at)
                x = lanes.embed_lane(x, context, at)
                y, residuals = stage.forward(lanes.blocks[repeat], x, context)
                x, (y, residuals) = fence(x, (y, residuals))
                dy = y
                if repeat == schedule.repeats - 1:
                    last = lanes.device == schedule.device_of(schedule.stages - 1)
                    state, dy, commit = lanes.head_lane(state, row | {"h_gradient": jnp.where(last, 0, -1)}, y)
                    state = commit(state)
                here = lanes.blocks[repeat], x, residuals, context
                if split:
                    dx, crossing = fence(*stage.backward_input(*here, dy))
                    dw = stage.backward_weight(*here, crossing)
                else:
                    dw, dx = stage.backward(*here, dy)
                dx, dw = fence(dx, list(dw))
                state = state | {"blocks": lanes.add(state["blocks"], at, dw)}
                state = lanes.embed_gradient_lane(state, row, dx)
                x, _ = fence(carry, dx)
            return (state, x), None

        return lax.scan(microbatch, (state, carry), jnp.arange(schedule.microbatches))[0][0]

    return program(params, batch, None, loop=device)


def _head(cores: int) -> str:
    return (
        f"T1 on one core, the rest on {cores}; seconds are medians\n"
        f"{'schedule':17} {'P':>2} {'V':>2} {'M':>3} {'remat':>5} {'T1':>7} {'T_dev':>7} {'limit':>7} {'step':>7} "
        f"{'step/limit':>10} {'T_dev*n/T1':>10} {'T1/step':>7} {'cpu s':>6} {'temp MB':>8} {'plan MB':>8} {'arith':>6} "
        f"{'compile':>8}"
    )


def _line(r: Row) -> str:
    return (
        f"{r.schedule:17} {r.P:2} {r.V:2} {r.M:3} {r.remat:>5} {r.t1_s:7.3f} {r.t_dev_s:7.3f} {r.limit_s:7.3f} "
        f"{r.step_s:7.3f} {r.ratio_to_limit:10.2f} {r.t_dev_ratio:10.2f} {r.speedup:7.2f} {r.cpu_s:6.2f} "
        f"{r.temp_bytes / 1e6:8.1f} {r.planned_bytes / 1e6:8.1f} {r.arithmetic:6.2f} {r.compile_s:8.1f}"
    )


if __name__ == "__main__":
    sys.exit(main())
