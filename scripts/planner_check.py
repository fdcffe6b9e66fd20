"""The planner against this machine: predicted and measured steps of the same programs on simulated CPU devices.

    python scripts/planner_check.py                     # every case once; about 20 minutes
    python scripts/planner_check.py --cases 4 --rounds 3
    python scripts/planner_check.py --ranking           # is the predicted best of ten among the measured best three?
    python scripts/planner_check.py --json

First one block of each kind is timed (`jaxpipe.train.profiling`), then every case is predicted, compiled and timed.
Devices share this machine's cores: with P = 4 on 2 cores a tick takes half of all its work. Run it on a quiet machine.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

import jaxpipe as jp
from jaxpipe.plan import DeviceSpec, Plan, Space, find_device, search
from jaxpipe.plan.device import MEMORY_FRACTION
from jaxpipe.runtime.mesh import make_mesh, simulate_devices
from jaxpipe.runtime.sizes import memory_of
from jaxpipe.schedule import build
from jaxpipe.train import toml
from jaxpipe.train.bench import num_cores
from jaxpipe.train.bench.case import DEFAULT
from jaxpipe.train.bench.memory import keep_freed_memory
from jaxpipe.train.config import SCHEMA, Config, from_tables
from jaxpipe.train.model import gpt_model
from jaxpipe.train.planning import ask
from jaxpipe.train.profile import Profile
from jaxpipe.train.profiling import profile

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


def predict(config: Config, case: Case, measured: Profile, device: DeviceSpec) -> Plan:
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
    problem = ask(config, device, case.pipe, space=space, costs=measured.costing(config, "measured here"))
    best = search(replace(problem, memory_bytes=float("inf")), pareto=False).best
    assert best is not None
    return best


def measure(config: Config, case: Case, rounds: int) -> tuple[float, int]:
    """Median seconds of the compiled step without optimizer, and its temporaries in bytes."""
    microbatches = config.schedule.microbatches
    schedule = build(case.schedule, devices=case.pipe, microbatches=microbatches, repeats=case.repeats)
    remat: Any = case.remat
    pipe = jp.Pipeline(
        gpt_model(config.model), schedule=schedule, mesh=make_mesh(pipe=case.pipe), stages=case.stages, remat=remat
    )
    rng = np.random.default_rng(0)
    shape = (config.train.batch_size, config.train.seq_len)
    tokens = {name: rng.integers(0, 256, shape, dtype=np.int32) for name in ("tokens", "targets")}
    batch = jax.device_put(tokens, pipe.batch_sharding)
    params = pipe.init(jax.random.key(0), batch)
    step = jax.jit(pipe.value_and_grad).lower(params, batch).compile()
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        jax.block_until_ready(step(params, batch))
        times.append(time.perf_counter() - start)
    temporary = memory_of(step).temp_size_in_bytes
    jax.clear_caches()
    return statistics.median(times[1:]), temporary


def main() -> None:
    """Prints the table; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=99, metavar="N", help="only the first N cases")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="steps timed per case, by default 7")
    parser.add_argument("--ranking", action="store_true", help="predict and measure ten plans with P = 4")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="such as model.d_model=128")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options: Any = parser.parse_args()
    keep_freed_memory()
    simulate_devices(4)
    config = from_tables(toml.override(MODEL, options.set, SCHEMA))
    rows = config.train.batch_size // config.schedule.microbatches
    device = find_device("cpu", cores=num_cores())
    measured = profile(config, device, rows=[rows], remats=("none", "full"), rounds=options.rounds)
    device = replace(device, memory_bytes_per_s=measured.traffic_bytes_per_s / MEMORY_FRACTION)
    chosen = list(cases())
    if options.ranking:
        chosen = [case for case in chosen if case.pipe == 4][:10]
    found = []
    if not options.json:
        print(f"{num_cores()} cores; medians of {options.rounds} steps\n")
        print(
            "| schedule | P | V | remat | stages | predicted s | measured s | error | predicted MB | temp MB | error |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|")
    for case in chosen[: options.cases]:
        plan = predict(config, case, measured, device)
        seconds, temporary = measure(config, case, options.rounds)
        predicted_s = plan.step_s - plan.optimizer_s
        stages = "equal" if case.stages is None else plan.layout
        row = {**vars(case), "stages": stages, "predicted_s": predicted_s, "measured_s": seconds}
        row |= {"predicted_bytes": plan.memory.temporary, "temp_bytes": temporary}
        found.append(row)
        if not options.json:
            print(
                f"| `{case.schedule}` | {case.pipe} | {case.repeats} | {case.remat} | {stages.replace('|', '¦')} | "
                f"{predicted_s:.3f} | {seconds:.3f} | {predicted_s / seconds - 1:+.0%} | "
                f"{plan.memory.temporary / 1e6:.1f} | {temporary / 1e6:.1f} | "
                f"{plan.memory.temporary / temporary - 1:+.0%} |",
                flush=True,
            )
    best = min(found, key=lambda row: row["predicted_s"])
    place = 1 + sorted(row["measured_s"] for row in found).index(best["measured_s"])
    if options.json:
        print(json.dumps({"cores": num_cores(), "rows": found, "place_of_predicted_best": place}, indent=1))
        return
    off = [abs(row["predicted_s"] / row["measured_s"] - 1) for row in found]
    print(f"\nmean |error| {statistics.fmean(off):.0%}, largest {max(off):.0%}")
    print(f"the predicted best of {len(found)} is number {place} as measured")


if __name__ == "__main__":
    main()
