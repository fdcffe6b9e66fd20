"""jaxpipe against torch.distributed.pipelining: a pipeline of two processes with one CPU core each, over gloo.

    python scripts/bench_torch.py                                  # needs torch==2.13.0 beside jaxpipe
    python scripts/bench_torch.py --torch-python other/bin/python  # or in an environment of its own
    python scripts/bench_torch.py --no-torch --json                # jaxpipe's side alone

Both sides train the same GPT with the same parameters and batch, in float32: torch eagerly, as its users do. Timed in
turn, round after round, so that the machine's drift falls on all of them:

    step    loss and gradients of one batch, by two processes (the slower counts)
    T1      the same by one process on one core, accumulating the gradients over the microbatches

torch keeps every residual, which is remat "all". Reported are medians over the rounds and their ratios, and the CPU
seconds of all processes, which say how much of the time other programs took. Before anything
is timed, loss and norm of the gradient must agree: two processes with one, and torch with jaxpipe.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bench_case import Case
from bench_workers import WorkerError, Workers

TORCH = "torch==2.13.0"
RANKS = 2
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": 2}  # and their V
OURS = [f"jaxpipe rank {rank}" for rank in range(RANKS)]
THEIRS = [f"torch rank {rank}" for rank in range(RANKS)]
OUR_ONE, THEIR_ONE = "jaxpipe on one core", "torch on one core"
TOLERANCE = 1e-5  # relative, of the loss and of the norm of the gradient


@dataclass(frozen=True)
class Row:
    """One line of the table; times in seconds, medians; what is torch's is None with ``--no-torch``."""

    schedule: str
    V: int
    M: int
    remat: str
    step_s: float
    t1_s: float
    speedup: float
    cpu_s: float
    t1_cpu_s: float
    loss: float
    t1_loss: float
    compile_s: float
    torch_step_s: float | None = None
    torch_t1_s: float | None = None
    torch_speedup: float | None = None
    torch_cpu_s: float | None = None
    torch_t1_cpu_s: float | None = None
    torch_loss: float | None = None
    torch_over_jaxpipe: float | None = None
    torch_t1_over_jaxpipe_t1: float | None = None


class Disagreement(Exception):
    """Two runs of the same step computed different numbers."""


def main() -> int:
    """Runs the cases and prints the table."""
    options = _arguments().parse_args()
    case = Case(**{field.name: getattr(options, field.name) for field in fields(Case)})
    stages = RANKS * max(SCHEDULES[name] for name in options.schedule)
    if case.num_layers % stages:
        print(f"error: --num-layers={case.num_layers} must be a multiple of {stages} stages", file=sys.stderr)
        return 2
    version = None if options.no_torch else _torch_version(options.torch_python)
    if version is None and not options.no_torch:
        print(
            f"error: {options.torch_python} has no torch; pip install {TORCH}, or give --torch-python or --no-torch",
            file=sys.stderr,
        )
        return 2
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < RANKS:
        print(f"warning: {RANKS} processes share {len(cores)} core", file=sys.stderr)
    rows = []
    try:
        with tempfile.TemporaryDirectory() as folder, Workers(options.timeout) as workers:
            _start(workers, case, cores, version and options.torch_python, Path(folder) / "meet")
            for microbatches in options.microbatches:
                for name in options.schedule:
                    new = _measure(workers, name, microbatches, options.remat, options.rounds, version is not None)
                    rows += new
                    if not options.json:
                        head = "" if len(rows) > len(new) else f"{_head(case, version)}\n"
                        print(head + "\n".join(map(_line, new)), flush=True)
    except (WorkerError, Disagreement) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        about = {"case": asdict(case), "ranks": RANKS, "cores": len(cores), "torch": version, "rounds": options.rounds}
        print(json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1))
    return 0


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--schedule", nargs="+", default=["1f1b", "interleaved_1f1b"], choices=SCHEDULES)
    parser.add_argument("--remat", nargs="+", default=["none", "all"], choices=["full", "none", "all"])
    parser.add_argument("--microbatches", type=int, nargs="+", default=[8], help="M")
    parser.add_argument("--rounds", type=int, default=7, help="how often each thing is timed")
    parser.add_argument("--no-torch", action="store_true", help="time jaxpipe alone")
    parser.add_argument("--torch-python", default=sys.executable, metavar="PATH", help="an interpreter that has torch")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="how long one answer may take")
    parser.add_argument("--json", action="store_true")
    sizes = parser.add_argument_group("sizes of the model")
    for field in fields(Case):
        sizes.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    return parser


def _torch_version(python: str) -> str | None:
    try:
        done = subprocess.run([python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _start(workers: Workers, case: Case, cores: list[int], torch_python: str | None, meet: Path) -> None:
    """Starts all processes: a rank has a core of its own on its side; sides take turns.

    Args:
        workers: Where they go.
        case: The case.
        cores: The cores that we may use.
        torch_python: The interpreter of torch's side; None to leave it out.
        meet: A path at which torch's ranks may meet.
    """
    here = Path(__file__).parent
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    ours = [sys.executable, str(here / "bench_torch_ours.py")]
    theirs = [torch_python or "", str(here / "bench_torch_theirs.py")]
    base = {"case": asdict(case), "core": cores[0]}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers.start(OUR_ONE, [*ours, json.dumps(base)], {})
    if torch_python:
        workers.start(THEIR_ONE, [*theirs, json.dumps(base)], one_thread)
    for rank in range(RANKS):
        options = base | {"core": cores[rank % len(cores)], "rank": rank, "ranks": RANKS}
        workers.start(OURS[rank], [*ours, json.dumps(options | {"port": port})], {})
        if torch_python:
            workers.start(THEIRS[rank], [*theirs, json.dumps(options | {"meet": str(meet)})], one_thread)


def _measure(workers: Workers, schedule: str, microbatches: int, remats: list[str], rounds: int, torch: bool):
    """The rows of one schedule, one per remat."""
    common = {"schedule": schedule, "repeats": SCHEDULES[schedule], "microbatches": microbatches}
    name = f"{schedule} M={microbatches}"
    t1 = workers.ask([OUR_ONE], "build", microbatches=microbatches)[0]
    built = {r: workers.ask(OURS, "build", name=f"{name} {r}", remat=r, **common)[0] for r in remats}
    for remat in remats:
        _check(f"{name} remat={remat}, {RANKS} processes", built[remat], "one process", t1)
    runs = {"t1": ([OUR_ONE], {})} | {remat: (OURS, {"name": f"{name} {remat}"}) for remat in remats}
    if torch:
        arrays = workers.ask([OUR_ONE], "arrays", microbatches=microbatches)[0]
        torch_t1 = workers.ask([THEIR_ONE], "build", microbatches=microbatches, arrays=arrays)[0]
        built["torch"] = workers.ask(THEIRS, "build", name=name, arrays=arrays, **common)[0]
        _check("torch, one process", torch_t1, "jaxpipe, one process", t1)
        _check(f"torch, {name}, {RANKS} processes", built["torch"], "one process", torch_t1)
        runs |= {"torch_t1": ([THEIR_ONE], {}), "torch": (THEIRS, {"name": name})}

    times, cpus = {run: [] for run in runs}, {run: [] for run in runs}
    for warm in range(rounds + 1):
        for run, (names, arguments) in runs.items():
            answers = workers.ask(names, "step", **arguments)
            if warm:
                times[run].append(max(answer["time_s"] for answer in answers))
                cpus[run].append(sum(answer["cpu_s"] for answer in answers))
    time_s = {run: statistics.median(values) for run, values in times.items()}
    cpu_s = {run: statistics.median(values) for run, values in cpus.items()}

    def row(remat: str) -> Row:
        theirs = {}
        if torch:
            theirs = {
                "torch_step_s": time_s["torch"],
                "torch_t1_s": time_s["torch_t1"],
                "torch_speedup": time_s["torch_t1"] / time_s["torch"],
                "torch_cpu_s": cpu_s["torch"],
                "torch_t1_cpu_s": cpu_s["torch_t1"],
                "torch_loss": built["torch"]["loss"],
                "torch_over_jaxpipe": time_s["torch"] / time_s[remat],
                "torch_t1_over_jaxpipe_t1": time_s["torch_t1"] / time_s["t1"],
            }
        return Row(
            schedule=schedule,
            V=SCHEDULES[schedule],
            M=microbatches,
            remat=remat,
            step_s=time_s[remat],
            t1_s=time_s["t1"],
            speedup=time_s["t1"] / time_s[remat],
            cpu_s=cpu_s[remat],
            t1_cpu_s=cpu_s["t1"],
            loss=built[remat]["loss"],
            t1_loss=t1["loss"],
            compile_s=built[remat]["compile_s"],
            **theirs,
        )

    return [row(remat) for remat in remats]


def _check(what: str, a: dict, whose: str, b: dict) -> None:
    for key in ("loss", "grad_norm"):
        if not abs(a[key] - b[key]) <= TOLERANCE * abs(b[key]):
            raise Disagreement(f"{key} of {what}: {a[key]!r}, of {whose}: {b[key]!r}")


def _head(case: Case, version: str | None) -> str:
    about = f"torch {version}" if version else "no torch"
    measured = f"{'T1':>7} {'(cpu)':>6} {'step':>7} {'(cpu)':>6} {'T1/step':>7}"
    columns = f"{'schedule':17} {'V':>2} {'M':>3} {'remat':>5} {measured}"
    if version:
        columns += f" torch: {measured} torch/jaxpipe"
    return (
        f"{case}; {RANKS} processes of one core; {about}; seconds are medians, cpu is of all processes\n"
        f"{columns} {'loss':>9}"
    )


def _line(r: Row) -> str:
    line = f"{r.schedule:17} {r.V:2} {r.M:3} {r.remat:>5} "
    line += _measured(r.t1_s, r.t1_cpu_s, r.step_s, r.cpu_s, r.speedup)
    if r.torch_over_jaxpipe is not None:
        theirs = _measured(r.torch_t1_s, r.torch_t1_cpu_s, r.torch_step_s, r.torch_cpu_s, r.torch_speedup)
        line += f" {theirs:>44} {r.torch_over_jaxpipe:13.2f}"
    return f"{line} {r.loss:9.6f}"


def _measured(t1_s, t1_cpu_s, step_s, cpu_s, speedup) -> str:
    return f"{t1_s:7.3f} {t1_cpu_s:6.2f} {step_s:7.3f} {cpu_s:6.2f} {speedup:7.2f}"


if __name__ == "__main__":
    sys.exit(main())
