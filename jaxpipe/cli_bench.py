"""`jaxpipe bench`: times compiled steps against what the machine can do, on simulated CPU devices."""

import argparse
import json
from collections.abc import Sequence

from jaxpipe.errors import ConfigError

REMATS = ("full", "none", "all")
IDLES = ("skip", "mask")

EXAMPLES = """examples:
  jaxpipe bench                                    the table of the README
  jaxpipe bench --devices 2 --remat none --json
  jaxpipe bench --devices 4 --schedule 1f1b zb_h1 zb_v --microbatches 8 16
  jaxpipe bench --config configs/quickstart.toml --devices 2

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
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="how often each is timed, by default 7")
    parser.add_argument("--config", metavar="CONFIG", help="take model, microbatch and defaults from a training run")
    parser.add_argument("--set", nargs="+", metavar="key=value", default=[], help="such as model.num_layers=16")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(options: argparse.Namespace) -> int:
    """Runs the command. Every wrong input is a `JaxpipeError`."""
    _check(options)
    from jaxpipe.runtime.mesh import simulate_devices
    from jaxpipe.train import bench, load
    from jaxpipe.train.bench import report

    config = load(options.config, options.set) if options.config else None
    workload = bench.workload_of(config, options.set)
    mine = config and config.schedule
    cases, left_out = bench.make_cases(
        workload,
        schedules=options.schedule or (mine and [mine.name]),
        devices=options.devices or (config and [config.mesh.pipe]) or [2, 4, 8],
        repeats=options.repeats or (mine and [mine.repeats]),
        microbatches=options.microbatches or (mine and [mine.microbatches]) or [8],
        remats=options.remat or (mine and [mine.remat]) or ["full", "none"],
        idles=options.idle,
    )
    simulate_devices(max(case.schedule.devices for case in cases))
    rows = []
    if not options.json:
        print(report.head(bench.num_cores()), flush=True)
    with bench.OneCore(workload) as single:
        for case in cases:
            rows.append(bench.measure(case, single, options.rounds))
            if not options.json:
                print(report.line(rows[-1]), flush=True)
    if options.json:
        answer = {"cores": bench.num_cores(), "rows": [vars(row) for row in rows], "left_out": left_out}
        print(json.dumps(answer, indent=1))
    for reason in left_out if not options.json else ():
        print(f"left out: {reason}")
    return 0


def _check(options: argparse.Namespace) -> None:
    """The numbers that nobody behind this door looks at."""
    counts: dict[str, Sequence[int] | None] = {
        "--devices": options.devices,
        "--repeats": options.repeats,
        "--microbatches": options.microbatches,
        "--rounds": [options.rounds],
    }
    for option, values in counts.items():
        for value in values or ():
            if value < 1:
                raise ConfigError(f"{option} {value} must be at least 1; try 1")
