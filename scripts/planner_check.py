"""The planner against this machine: predicted and measured steps of the same programs on simulated CPU devices.

    python scripts/planner_check.py                     # every case once; about 10 minutes
    python scripts/planner_check.py --cases 4 --rounds 3
    python scripts/planner_check.py --ranking           # is the predicted best of ten among the measured best three?
    python scripts/planner_check.py --h100              # temporaries alone, of programs for H100s (extra gpu-aot)
    python scripts/planner_check.py --json

All cases are compiled, then one block of each kind is timed (`jaxpipe.measure.profiling`), then the cases in turn, then
the blocks once more: where the two differ, the machine was not at one speed. Predictions are the mean of both.
Devices share this machine's cores: with P = 4 on 2 cores a tick takes half of all its work. Run it on a quiet machine.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

import jaxpipe as jp
from jaxpipe.config import toml
from jaxpipe.config.run import SCHEMA, Config, from_tables
from jaxpipe.measure.bench import num_cores
from jaxpipe.measure.bench.case import DEFAULT
from jaxpipe.measure.bench.memory import keep_freed_memory
from jaxpipe.measure.compiled import compiled_costs
from jaxpipe.measure.planning import Costing, ask
from jaxpipe.measure.profile import Profile
from jaxpipe.measure.profiling import profile
from jaxpipe.measure.targets import h100_devices, mesh_of
from jaxpipe.models.build import gpt_model
from jaxpipe.plan import DeviceSpec, Plan, Space, find_device, search
from jaxpipe.plan.device import MEMORY_FRACTION
from jaxpipe.runtime.layout.mesh import AXES, make_mesh, simulate_devices
from jaxpipe.runtime.measure.sizes import memory_of
from jaxpipe.schedule import build

MODEL: dict[str, dict[str, Any]] = DEFAULT | {
    "schedule": {"microbatches": 8},
    "train": {"seq_len": 128, "batch_size": 16},
}
"""The model of the README's table, with microbatches of two rows."""


@dataclass(frozen=True)
class Case:
    """One program.

    Attributes:
        schedule: Its name.
        pipe: P.
        repeats: V.
        remat: What forwards keep.
        stages: Blocks per stage; None for equal ones.
    """

    schedule: str
    pipe: int
    repeats: int
    remat: str
    stages: tuple[int, ...] | None = None


def cases() -> Iterator[Case]:
    """P in {2, 4}, V in {1, 2}, five schedules, uneven stages, both remats."""
    for pipe in (2, 4):
        for remat in ("full", "none"):
            yield Case("1f1b", pipe, 1, remat)
            yield Case("interleaved_1f1b", pipe, 2, remat)
            yield Case("gpipe", pipe, 1, remat)
            yield Case("zb_h1", pipe, 1, remat)
            yield Case("zb_v", pipe, 2, remat)
            yield Case("1f1b", pipe, 1, remat, (5, 3) if pipe == 2 else (2, 3, 2, 1))


def predict(config: Config, case: Case, costs: Costing, device: DeviceSpec) -> Plan:
    """What the planner says of a case."""
    rows = config.train.batch_size // config.schedule.microbatches
    space = Space(
        schedules=(case.schedule,),
        pipe=(case.pipe,),
        repeats=(case.repeats,),
        tensor=(1,),
        fsdp=(1,),
        data=(1,),
        rows=(rows,),
        remats=(case.remat,),  # pyright: ignore[reportArgumentType]
        counts=case.stages,
        split="equal" if case.stages is None else "any",
        packing="auto",
        order="ideal",
    )
    problem = ask(config, device, case.pipe, space=space, costs=costs)
    best = search(replace(problem, memory_bytes=float("inf")), pareto=False).best
    assert best is not None
    return best


@dataclass(frozen=True)
class Program:
    """A compiled step without optimizer, with its arguments."""

    step: Callable[..., Any]
    arguments: tuple[Any, ...]
    temporary: int

    def seconds(self) -> float:
        """Of one step."""
        start = time.perf_counter()
        jax.block_until_ready(self.step(*self.arguments))
        return time.perf_counter() - start


def pipeline(config: Config, case: Case, mesh: Any) -> jp.Pipeline:
    """The pipeline of a case."""
    schedule = build(case.schedule, devices=case.pipe, microbatches=config.schedule.microbatches, repeats=case.repeats)
    remat: Any = case.remat
    return jp.Pipeline(gpt_model(config.model), schedule=schedule, mesh=mesh, stages=case.stages, remat=remat)


def program(config: Config, case: Case) -> Program:
    """The compiled step of a case, run once to warm up."""
    pipe = pipeline(config, case, make_mesh(pipe=case.pipe))
    rng = np.random.default_rng(0)
    shape = (config.train.batch_size, config.train.seq_len)
    tokens = {name: rng.integers(0, 256, shape, dtype=np.int32) for name in ("tokens", "targets")}
    batch = jax.device_put(tokens, pipe.batch_sharding)
    params = pipe.init(jax.random.key(0), batch)
    step = jax.jit(pipe.value_and_grad).lower(params, batch).compile()
    made = Program(step, (params, batch), memory_of(step).temp_size_in_bytes)
    made.seconds()
    return made


def h100_temporaries(config: Config, case: Case) -> int:
    """Bytes of the step compiled for H100s."""
    grid = np.asarray(h100_devices(case.pipe)).reshape(-1, 1, 1, 1)
    pipe = pipeline(config, case, Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 4))
    shape = (config.train.batch_size, config.train.seq_len)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=pipe.batch_sharding)
    batch = {"tokens": tokens, "targets": tokens}
    params = jax.eval_shape(pipe.init, jax.random.key(0), batch)
    placed = jax.tree.map(
        lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), params, pipe.layout.shardings(params)
    )
    return memory_of(jax.jit(pipe.value_and_grad).lower(placed, batch).compile()).temp_size_in_bytes


def compare_h100(config: Config, chosen: Sequence[Case]) -> None:
    """Prints predicted and compiled temporaries."""
    device = find_device("h100")
    rows = config.train.batch_size // config.schedule.microbatches
    costs = compiled_costs(config, device, rows, ("none", "full"), mesh_of(device))
    print("| schedule | P | V | remat | stages | predicted MB | XLA MB | error |\n|---|---|---|---|---|---|---|---|")
    for case in chosen:
        plan = predict(config, case, lambda rows, tensor: costs, device)
        compiled, predicted = h100_temporaries(config, case), plan.memory.temporary
        stages = "equal" if case.stages is None else plan.layout.replace("|", "¦")
        print(
            f"| `{case.schedule}` | {case.pipe} | {case.repeats} | {case.remat} | {stages} | {predicted / 1e6:.1f} | "
            f"{compiled / 1e6:.1f} | {predicted / compiled - 1:+.0%} |",
            flush=True,
        )


def measure(programs: Sequence[Program], rounds: int) -> list[float]:
    """Median seconds of each. All run in turn, so that a slow minute of the machine is in all of them."""
    times = [[one.seconds() for one in programs] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def main() -> None:
    """Prints the table; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=99, metavar="N", help="only the first N cases")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="steps timed per case, by default 7")
    parser.add_argument("--ranking", action="store_true", help="predict and measure ten plans with P = 4")
    parser.add_argument("--h100", action="store_true", help="compare temporaries of programs for H100s, and no times")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="such as model.d_model=128")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options: Any = parser.parse_args()
    keep_freed_memory()
    simulate_devices(4)
    config = from_tables(toml.override(MODEL, options.set, SCHEMA))
    rows = config.train.batch_size // config.schedule.microbatches
    device = find_device("cpu", cores=num_cores())
    chosen = list(cases())
    if options.ranking:
        chosen = [case for case in chosen if case.pipe == 4][:10]
    chosen = chosen[: options.cases]
    if options.h100:
        compare_h100(config, chosen)
        return

    def blocks() -> Profile:
        return profile(config, device, rows=[rows], remats=("none", "full"), rounds=options.rounds)

    programs = [program(config, case) for case in chosen]
    before = blocks()
    measured = measure(programs, options.rounds)
    sides = [
        (predicted, replace(device, memory_bytes_per_s=predicted.traffic_bytes_per_s / MEMORY_FRACTION))
        for predicted in (before, blocks())
    ]
    found = []
    for case, made, seconds in zip(chosen, programs, measured, strict=True):
        first, last = (predict(config, case, found.costing(config, "measured"), device) for found, device in sides)
        predicted_s = [plan.step_s - plan.optimizer_s for plan in (first, last)]
        stages = "equal" if case.stages is None else first.layout
        row = {**vars(case), "stages": stages, "predicted_s": statistics.fmean(predicted_s), "measured_s": seconds}
        row |= {"drift": predicted_s[1] / predicted_s[0] - 1}
        row |= {"predicted_bytes": first.memory.temporary, "temp_bytes": made.temporary}
        found.append(row)
    best = min(found, key=lambda row: row["predicted_s"])
    place = 1 + sorted(row["measured_s"] for row in found).index(best["measured_s"])
    alone = [one.costs[rows].alone for one, _ in sides]
    if options.json:
        answer = {"cores": num_cores(), "rows": found, "place_of_predicted_best": place, "alone": alone}
        print(json.dumps(answer, indent=1))
        return
    print(f"{num_cores()} cores; medians of {options.rounds} steps, all cases in turn\n")
    print("| schedule | P | V | remat | stages | predicted s | measured s | error | predicted MB | temp MB | error |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in found:
        seconds, megabytes = (
            f"{predicted:.3f} | {measured:.3f} | {predicted / measured - 1:+.0%}"
            for predicted, measured in (
                (row["predicted_s"], row["measured_s"]),
                (row["predicted_bytes"] / 1e6, row["temp_bytes"] / 1e6),
            )
        )
        case = f"`{row['schedule']}` | {row['pipe']} | {row['repeats']} | {row['remat']}"
        print(f"| {case} | {row['stages'].replace('|', '¦')} | {seconds} | {megabytes} |")
    off = [abs(row["predicted_s"] / row["measured_s"] - 1) for row in found]
    print(f"\nmean |error| {statistics.fmean(off):.0%}, largest {max(off):.0%}")
    print(f"the predicted best of {len(found)} is number {place} as measured")
    drift = statistics.fmean(row["drift"] for row in found)
    print(f"predictions from blocks timed after the steps instead of before: {drift:+.0%}")
    print("a lane alone is " + " and ".join(f"{times:.2f}" for times in alone) + " times as fast as beside others")


if __name__ == "__main__":
    main()
