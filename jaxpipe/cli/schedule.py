"""`jaxpipe schedule`: build or read schedules, print their numbers, draw and convert them. Needs no jax."""

import argparse
import difflib
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxpipe.errors import ConfigError, ScheduleError
from jaxpipe.schedule import show
from jaxpipe.schedule.auto import auto
from jaxpipe.schedule.by_name import build
from jaxpipe.schedule.catalog import CATALOG
from jaxpipe.schedule.costs import Costs
from jaxpipe.schedule.forms import text
from jaxpipe.schedule.ir import Schedule
from jaxpipe.schedule.show.timeline import hop_count
from jaxpipe.schedule.simulate import Runtime, Timing, simulate
from jaxpipe.screen import behind, printable

RUNTIMES = ("async", "lockstep", "lockstep_local")

SUFFIXES = (".svg", ".png", ".html", ".csv", ".trace.json", ".json")
"""What --out writes, by the end of the file's name; the longer of two that fit stands first."""

EXAMPLES = """examples:
  jaxpipe schedule 1f1b --devices 4 --microbatches 8
  jaxpipe schedule interleaved_1f1b --devices 4 --microbatches 8 --repeats 2 --hop 0.1 --out timeline.svg
  jaxpipe schedule --compare 1f1b,zb_h1,zb_v --devices 4 --microbatches 16 --out compare.html
  jaxpipe schedule auto --devices 4 --microbatches 16 --costs 1,1.2,0.8 --memory 3
  jaxpipe schedule --from mine.csv --costs 1,1.2,0.8 --runtime lockstep --json

exit codes: 0 done, 2 bad arguments or a schedule that breaks a rule"""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the parser of `jaxpipe`."""
    parser = commands.add_parser(
        "schedule",
        help="print, draw, compare and convert schedules",
        description="Builds a schedule, or reads one, and shows how long it takes and what it keeps.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        help="a schedule of the catalogue, see --list, or 'auto': the fastest that fits",
    )
    parser.add_argument("--compare", metavar="A,B,…", help="a table of several schedules, or 'all', fastest first")
    parser.add_argument("--from", dest="source", metavar="FILE", help="read a schedule from a .csv or .json file")
    parser.add_argument("--list", action="store_true", help="list the catalogue")
    parser.add_argument("--devices", type=int, metavar="P")
    parser.add_argument("--microbatches", type=int, metavar="M")
    parser.add_argument("--repeats", type=int, metavar="V", help="stages per device, by default the schedule's own")
    parser.add_argument(
        "--costs",
        metavar="F,I,W",
        help="times of forward, input gradient and weight gradient of a full device for one microbatch, by default "
        "1,1,1; numbers per stage are joined by colons, such as 1:2:1,1,1",
    )
    parser.add_argument("--hop", type=float, metavar="TIME", help="time of one transfer between devices, by default 0")
    parser.add_argument("--runtime", choices=RUNTIMES, default="async", help="how devices wait, by default async")
    parser.add_argument(
        "--memory", type=float, metavar="A", help="with auto: the most activations a device may keep, by default any"
    )
    parser.add_argument("--out", metavar="FILE", help=f"write a file that ends in {', '.join(SUFFIXES)}")
    parser.add_argument("--json", action="store_true", help="print the same numbers as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command. Every wrong input is a `JaxpipeError`."""
    _run(options)
    return 0


def _run(options: argparse.Namespace) -> None:
    _check_choice(options)
    suffix = _suffix(options.out)
    if options.list:
        print(_catalogue(options.json))
        return
    schedules, costs, left_out, reason = _schedules(options)
    timings = [simulate(schedule, costs, options.runtime) for schedule in schedules]
    if options.compare is not None:
        by_time = sorted(range(len(schedules)), key=lambda n: (round(timings[n].makespan, 9), _peak(timings[n])))
        schedules, timings = [schedules[n] for n in by_time], [timings[n] for n in by_time]
    if suffix is not None:
        _write(Path(options.out), suffix, schedules, costs, options.runtime)
    results = [_numbers(schedule, timing) for schedule, timing in zip(schedules, timings, strict=True)]
    if options.json:
        priced = {"runtime": options.runtime, "costs": vars(costs)}
        if options.compare is None:
            answer: dict[str, Any] = results[0] | priced | ({"reason": reason} if reason else {})
        else:
            answer = {"schedules": results, "left_out": left_out} | priced
        print(json.dumps(answer, indent=1))
    elif options.compare is not None:
        print(_table(results))
        for name, reason in left_out.items():
            print(f"left out: {name}: {reason}")
    else:
        note = show.timeline(schedules[0], costs, options.runtime).note
        print(_report(schedules[0], results[0], note), file=behind(sys.stdout))  # with colours on a terminal
        if reason:
            print(f"chosen       {reason}")
    if suffix is not None and not options.json:
        print(f"wrote {options.out}")


def _check_choice(options: argparse.Namespace) -> None:
    asked = {
        "NAME": options.name is not None,
        "--compare": options.compare is not None,
        "--from": options.source is not None,
        "--list": options.list,
    }
    given = [option for option, on in asked.items() if on]
    if len(given) != 1:
        what = f"{' and '.join(given)} exclude each other" if given else "nothing to show"
        raise ConfigError(f"{what}; give one of {', '.join(asked)}, such as: jaxpipe schedule --list")
    sizes = [f"--{size}" for size in ("devices", "microbatches", "repeats") if getattr(options, size) is not None]
    if (options.source is not None or options.list) and sizes:
        raise ConfigError(f"{', '.join(sizes)} has no effect with {given[0]}; leave it out")
    if options.memory is not None and options.name != "auto":
        raise ConfigError(f"--memory {options.memory:g} has no effect without auto; try NAME auto, or leave it out")
    if options.list:
        priced = ("costs", "hop", "out")
        without = [f"--{option}" for option in priced if getattr(options, option) is not None]
        if without:
            raise ConfigError(f"{', '.join(without)} has no effect with --list; leave it out")


def _schedules(options: argparse.Namespace) -> tuple[list[Schedule], Costs, dict[str, str], str | None]:
    """What to show, its costs, which schedules of a comparison cannot be built and why, and why auto chose its one."""
    if options.source is not None:
        if options.source.lower().endswith(".json"):
            schedule, stored = text.from_json(Path(options.source))
        else:
            schedule, stored = text.from_csv(Path(options.source)), None
        return [schedule], _costs(options.costs, options.hop, stored or Costs()), {}, None
    costs = _costs(options.costs, options.hop, Costs())
    names = [options.name] if options.compare is None else _names(options.compare)
    missing = [f"--{size}" for size in ("devices", "microbatches") if getattr(options, size) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be given; try {' '.join(f'{size} 4' for size in missing)}")
    shape = {"devices": options.devices, "microbatches": options.microbatches}
    if options.name == "auto":
        choice = auto(repeats=options.repeats, costs=costs, memory=options.memory, runtime=options.runtime, **shape)
        return [choice.schedule], costs, {}, choice.reason
    if options.compare is None:
        return [build(options.name, repeats=options.repeats, **shape)], costs, {}, None
    schedules, left_out = [], {}
    for name in names:
        own = CATALOG[name].repeats
        try:
            schedules.append(build(name, repeats=own or options.repeats, **shape))
        except ScheduleError as error:
            left_out[name] = str(error)
    if not schedules:
        raise ScheduleError("no schedule to compare: " + "; ".join(left_out.values()))
    return schedules, costs, left_out, None


def _names(compare: str) -> list[str]:
    """The names of a comparison, each once; an unknown one is an error at once."""
    names = [name for name in CATALOG if name != "inference"] if compare == "all" else compare.split(",")
    names = list(dict.fromkeys(name.strip() for name in names))
    for name in names:
        if name not in CATALOG:
            near = difflib.get_close_matches(name, CATALOG, n=1, cutoff=0.0)[0]
            raise ScheduleError(f"schedule={name!r} is not one of {', '.join(CATALOG)}; try {near!r}")
    return names


def _costs(phases: str | None, hop: float | None, base: Costs) -> Costs:
    changed: dict[str, Any] = {}
    if phases is not None:
        parts = phases.split(",")
        if len(parts) != 3:
            raise ConfigError(
                f"--costs {phases!r} has {len(parts)} numbers but must have 3, of forward, input gradient and weight "
                "gradient; try 1,1,1"
            )
        names = ("forward", "backward_input", "backward_weight")
        changed |= {name: _cost(phases, part) for name, part in zip(names, parts, strict=True)}
    if hop is not None:
        if not math.isfinite(hop):
            raise ConfigError(f"--hop {hop} must be a finite number; try 0")
        changed["hop"] = hop
    return replace(base, **changed)


def _cost(phases: str, part: str) -> float | tuple[float, ...]:
    try:
        numbers = tuple(float(number) for number in part.split(":"))
    except ValueError:
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise ConfigError(
            f"--costs {phases!r}: {part!r} must be a number, or one per stage joined by colons; try 1,1,1"
        )
    return numbers[0] if len(numbers) == 1 else numbers


def _suffix(out: str | None) -> str | None:
    """The known ending of a file's name."""
    if out is None:
        return None
    for suffix in SUFFIXES:
        if out.lower().endswith(suffix):
            return suffix
    own = Path(out).suffix
    near = difflib.get_close_matches(own.lower(), SUFFIXES, n=1, cutoff=0.0)[0] if own else SUFFIXES[0]
    raise ConfigError(f"--out {out!r} must end in one of {', '.join(SUFFIXES)}; try {out.removesuffix(own) + near!r}")


def _write(path: Path, suffix: str, schedules: list[Schedule], costs: Costs, runtime: Runtime) -> None:
    if suffix in (".csv", ".json") and len(schedules) > 1:
        raise ConfigError(
            f"--out {str(path)!r} holds one schedule but --compare has {len(schedules)}; try .html or .svg"
        )
    match suffix:
        case ".csv":
            content = text.to_csv(schedules[0])
        case ".json":
            content = text.to_json(schedules[0], costs)
        case ".svg":
            content = show.svg(schedules, costs, runtime)
        case ".html":
            content = show.html(schedules, costs, runtime)
        case ".trace.json":
            content = show.trace(schedules, costs, runtime)
        case _:
            content = show.png(schedules, costs, runtime)
    try:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    except OSError as error:
        raise ConfigError(f"--out {str(path)!r} cannot be written: {error.strerror}") from error


def _numbers(schedule: Schedule, timing: Timing) -> dict[str, Any]:
    return {
        "name": schedule.name,
        "devices": schedule.devices,
        "microbatches": schedule.microbatches,
        "repeats": schedule.repeats,
        "placement": schedule.placement,
        "makespan": timing.makespan,
        "bubble": timing.bubble,
        "span_bubble": timing.span_bubble,
        "peak_activations": timing.peak_activations,
        "hops": hop_count(schedule),
    }


def _report(schedule: Schedule, numbers: dict[str, Any], note: str) -> str:
    """The grid, if it fits, and the numbers."""
    grid = printable(show.text(schedule))
    terminal = sys.stdout.isatty()
    width = max(map(len, grid.split("\n")))
    if terminal and width > shutil.get_terminal_size().columns:
        title = grid.partition("\n")[0]
        hint = f"pipe it into less -S, or draw it with --out {schedule.name}.html"
        grid = f"{title}\n(the grid is {width} columns wide: {hint})"
    elif terminal and "NO_COLOR" not in os.environ:
        grid = show.coloured(grid)
    peaks = [f"{peak:.4g}" for peak in numbers["peak_activations"]]
    where = f"on devices 0..{schedule.devices - 1}" if len(set(peaks)) > 1 else "on every device"
    kept = ", ".join(peaks if len(set(peaks)) > 1 else peaks[:1])
    lines = {
        "makespan": f"{numbers['makespan']:.6g}   ({note})",
        "bubble": f"{_percent(numbers['bubble'])} of the makespan is idle",
        "span bubble": f"{_percent(numbers['span_bubble'])} of the longest span of one device",
        "peak memory": f"{kept} A {where}; A = what one microbatch leaves on a device",
        "hops": f"{numbers['hops']} transfers between devices",
    }
    return "\n".join([grid, "", *(f"{name:<12} {value}" for name, value in lines.items())])


def _table(results: list[dict[str, Any]]) -> str:
    head = ("schedule", "makespan", "bubble", "span bubble", "peak memory", "hops")
    rows = [
        (
            f"{one['name']} V={one['repeats']}",
            f"{one['makespan']:.6g}",
            _percent(one["bubble"]),
            _percent(one["span_bubble"]),
            f"{max(one['peak_activations']):.4g} A",
            str(one["hops"]),
        )
        for one in results
    ]
    return _columns([head, *rows])


def _catalogue(as_json: bool) -> str:
    if as_json:
        entries = [
            {"name": name, "repeats": family.repeats, "placement": family.placement, "summary": family.summary}
            for name, family in CATALOG.items()
        ]
        return json.dumps(entries, indent=1, ensure_ascii=False)
    head = ("schedule", "repeats", "placement", "what it is")
    rows = [(n, str(f.repeats or "any"), f.placement, f.summary) for n, f in CATALOG.items()]
    return _columns([head, *rows], left=(0, 2, 3))


def _columns(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            c.ljust(w) if n in left else c.rjust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _percent(share: float) -> str:
    return f"{abs(round(share, 9)):.1%}"


def _peak(timing: Timing) -> float:
    return max(timing.peak_activations)
