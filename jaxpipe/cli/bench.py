"""`jaxpipe bench`: times compiled steps against what the machine can do, on simulated CPU devices."""

import argparse
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpipe.errors import ConfigError
from jaxpipe.schedule import show

if TYPE_CHECKING:
    from jaxpipe.measure.bench import Case
    from jaxpipe.measure.bench.trace import Trace

REMATS = ("full", "none", "all")
IDLES = ("skip", "mask")

WRITERS = {".html": show.html, ".svg": show.svg, ".png": show.png, ".json": show.trace}
"""What --out writes, by the end of the file's name."""

EXAMPLES = """examples:
  jaxpipe bench                                    the table of the README
  jaxpipe bench --devices 2 --remat none --json
  jaxpipe bench --devices 4 --schedule 1f1b zb_h1 zb_v --microbatches 8 16
  jaxpipe bench --config configs/quickstart.toml --devices 2
  jaxpipe bench --trace --schedule zb_v --devices 2 --remat none --out trace.html
  jaxpipe bench --generate --devices 2 4           tokens per second, GPT-2 124M
  jaxpipe bench --generate --set model.num_layers=4 model.d_model=256 --sequences 8

exit codes: 0 done, 2 bad arguments or nothing to measure"""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the parser of `jaxpipe`."""
    parser = commands.add_parser(
        "bench",
        help="time compiled steps against what the machine can do",
        description="Times training steps on simulated CPU devices against the same lanes without a schedule (T_dev) "
        "and the same model without a pipeline on one core (T1). All combinations of the options are measured.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--schedule",
        nargs="+",
        metavar="NAME",
        help="schedules of the catalogue, by default 1f1b for V = 1 and interleaved_1f1b for V > 1",
    )
    parser.add_argument("--devices", type=int, nargs="+", metavar="P", help="by default 2 4 8")
    parser.add_argument("--repeats", type=int, nargs="+", metavar="V", help="by default 1 2, or the schedule's own")
    parser.add_argument("--microbatches", type=int, nargs="+", metavar="M", help="by default 8")
    parser.add_argument("--remat", nargs="+", choices=REMATS, help="by default full none")
    parser.add_argument("--idle", nargs="+", choices=IDLES, default=["skip"], help="by default skip")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often each is timed, by default 7")
    parser.add_argument(
        "--config",
        metavar="CONFIG",
        help="take model, microbatch, schedule and sizes from a training run; stages are of equal size",
    )
    parser.add_argument("--set", nargs="+", metavar="key=value", default=[], help="such as model.num_layers=16")
    parser.add_argument(
        "--trace",
        action="store_true",
        help="run one case once, in a debug build that notes when every lane starts and ends, and compare these times "
        "with the simulated ones; by default 1f1b with P = 2, remat full",
    )
    parser.add_argument(
        "--out", metavar="FILE", help=f"with --trace: draw both; ends in {', '.join(WRITERS)} (for Perfetto)"
    )
    parser.add_argument(
        "--generate",
        action="store_true",
        help="time generation instead: a ring of P devices against the same sequences on one core; the model is GPT-2 "
        "124M, but for --set",
    )
    parser.add_argument("--sequences", type=int, metavar="N", help="with --generate, at a time; by default 16")
    parser.add_argument("--prompt-len", type=int, metavar="N", help="with --generate; by default 128")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="with --generate; by default 64")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(options: argparse.Namespace) -> int:
    """Runs the command. Every wrong input is a `JaxpipeError`."""
    _check(options)
    if options.generate:
        return _generate(options)
    from jaxpipe.measure import bench
    from jaxpipe.measure.bench.memory import keep_freed_memory
    from jaxpipe.runtime.layout.mesh import simulate_devices
    from jaxpipe.train import load

    config = load(options.config, options.set) if options.config else None
    workload = bench.workload_of(config, options.set)
    mine = config and config.schedule
    remat: Any = [mine.remat] if mine and isinstance(mine.remat, str) else None  # not one per stage: stages are equal
    one = options.trace
    cases, left_out = bench.make_cases(
        workload,
        schedules=options.schedule or (mine and [mine.name]) or (["1f1b"] if one and not options.repeats else None),
        devices=options.devices or (config and [config.mesh.pipe]) or ([2] if one else [2, 4, 8]),
        repeats=options.repeats or (mine and [mine.repeats]),
        microbatches=options.microbatches or (mine and [mine.microbatches]) or [8],
        remats=options.remat or remat or (["full"] if one else ["full", "none"]),
        idles=options.idle,
    )
    if one and len(cases) > 1:
        raise ConfigError(
            f"--trace runs one case but the options make {len(cases)}; try --schedule {cases[0].schedule.name} "
            f"--devices {cases[0].schedule.devices} --remat {cases[0].remat}"
        )
    keep_freed_memory()
    simulate_devices(max(case.schedule.devices for case in cases))
    if one:
        _trace(cases[0], options)
    else:
        _measure(workload, cases, left_out, options)
    return 0


def _generate(options: argparse.Namespace) -> int:
    from jaxpipe.config import toml
    from jaxpipe.config.run import SCHEMA, from_tables
    from jaxpipe.infer import bench
    from jaxpipe.measure.bench import OneCore, num_cores
    from jaxpipe.measure.bench.memory import keep_freed_memory
    from jaxpipe.runtime.layout.mesh import simulate_devices

    devices = options.devices or [2, 4]
    preset = {"model": {"preset": "gpt2-124m"}, "schedule": {"microbatches": 1}, "train": {"batch_size": 1}}
    config = from_tables(toml.override(preset, options.set, SCHEMA)).model
    work = bench.Work(
        config,
        sequences=options.sequences or 16,
        prompt_len=options.prompt_len or 128,
        new_tokens=options.new_tokens or 64,
        repeats=(options.repeats or [1])[0],
    )
    keep_freed_memory()
    simulate_devices(max(devices))
    rows = []
    if not options.json:
        print(bench.head(work, num_cores()), flush=True)
    with OneCore(bench.timed_decode, work) as single:
        for count in devices:
            rows.append(bench.measure(work, count, single, options.rounds or 3))
            if not options.json:
                print(bench.line(rows[-1]), flush=True)
    if options.json:
        print(json.dumps({"cores": num_cores(), "rows": [bench.numbers(row) for row in rows]}, indent=1))
    return 0


def _measure(workload: Any, cases: list["Case"], left_out: list[str], options: argparse.Namespace) -> None:
    from jaxpipe.measure import bench
    from jaxpipe.measure.bench import report

    rows = []
    if not options.json:
        print(report.head(bench.num_cores()), flush=True)
    with bench.OneCore(bench.timed_step, workload) as single:
        for case in cases:
            rows.append(bench.measure(case, single, options.rounds or 7))
            if not options.json:
                print(report.line(rows[-1]), flush=True)
    if options.json:
        answer = {"cores": bench.num_cores(), "attention": workload.attention, "rows": [vars(row) for row in rows]}
        answer |= {"left_out": left_out}
        print(json.dumps(answer, indent=1))
    for reason in left_out if not options.json else ():
        print(f"left out: {reason}")


def _trace(case: "Case", options: argparse.Namespace) -> None:
    from jaxpipe.measure.bench import report
    from jaxpipe.measure.bench.trace import trace

    traced = trace(case)
    if options.out is not None:
        _write(traced, Path(options.out))
    if options.json:
        print(json.dumps(report.trace_numbers(traced), indent=1))
        return
    print(report.trace_text(traced))
    if options.out is not None:
        print(f"wrote {options.out}")


def _write(traced: "Trace", path: Path) -> None:
    """Draws measured above simulated; a trace for Perfetto has both as processes."""
    content = WRITERS[path.suffix.lower()](traced.timelines())
    try:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    except OSError as error:
        raise ConfigError(f"--out {str(path)!r} cannot be written: {error.strerror}") from error


def _check(options: argparse.Namespace) -> None:
    """What nobody behind this door looks at."""
    counts: dict[str, Sequence[int] | None] = {
        "--devices": options.devices,
        "--repeats": options.repeats,
        "--microbatches": options.microbatches,
        "--rounds": [options.rounds] if options.rounds is not None else None,
    }
    own = ("sequences", "prompt_len", "new_tokens")
    for name in own:
        value, option = getattr(options, name), f"--{name.replace('_', '-')}"
        counts[option] = [value] if value is not None else None
        if value is not None and not options.generate:
            raise ConfigError(f"{option} {value} has no effect without --generate; leave it out")
    if options.generate:
        given = {"--schedule": options.schedule, "--microbatches": options.microbatches, "--remat": options.remat}
        given |= {"--config": options.config, "--trace": options.trace, "--out": options.out}
        if named := [option for option, value in given.items() if value]:
            raise ConfigError(f"{named[0]} has no effect with --generate; leave it out")
        if len(options.repeats or []) > 1:
            raise ConfigError(f"--repeats {options.repeats} must be one number with --generate; try 1")
    for option, values in counts.items():
        for value in values or ():
            if value < 1:
                raise ConfigError(f"{option} {value} must be at least 1; try 1")
    if options.trace and options.rounds is not None:
        raise ConfigError(f"--rounds {options.rounds} has no effect with --trace, which runs once; leave it out")
    if options.out is None:
        return
    if not options.trace:
        raise ConfigError(f"--out {options.out!r} has no effect without --trace; try --trace --out {options.out}")
    own = Path(options.out).suffix
    if own.lower() not in WRITERS:
        near = difflib.get_close_matches(own.lower(), WRITERS, n=1, cutoff=0.0)[0] if own else ".html"
        near = options.out.removesuffix(own) + near
        raise ConfigError(f"--out {options.out!r} must end in one of {', '.join(WRITERS)}; try {near!r}")
