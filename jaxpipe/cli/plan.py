"""`jaxpipe plan`: where to split, which schedule, how many microbatches, what to recompute, and whether it fits."""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jaxpipe.errors import ConfigError

if TYPE_CHECKING:
    from jaxpipe.config.run import Config
    from jaxpipe.measure.planning import Costing
    from jaxpipe.plan import Answer, DeviceSpec, Space

SUFFIXES = (".toml", ".json", ".html")
"""What --out writes, by the end of the file's name."""

UNITS = {"": 1.0, "B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

EXAMPLES = """examples:
  jaxpipe plan configs/gpt2-124m.toml --devices 64 --device h100
  jaxpipe plan configs/gpt2-124m.toml --devices 8 --device a100 --memory 40GB --out plan.toml
  jaxpipe train plan.toml
  jaxpipe profile configs/quickstart.toml --out profile.json
  jaxpipe plan configs/quickstart.toml --devices 4 --costs profile.json --explain
  jaxpipe plan configs/gpt2-124m.toml --devices 8 --device h100 --costs compiled --rows 1 2 4
  jaxpipe plan --from runs/quickstart --devices 6 --device h100

exit codes: 0 done, 2 bad arguments, or nothing fits"""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the parser of `jaxpipe`."""
    parser = commands.add_parser(
        "plan",
        help="choose mesh, stages, schedule, microbatches and remat for given devices",
        description="Searches for the fastest way to train a config's model on given devices, by simulation, before "
        "there are any. Nothing is compiled or run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="TOML file of a run")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="such as model.num_layers=96")
    parser.add_argument("--from", dest="source", metavar="FOLDER", help="plan for the config in a run's folder instead")
    parser.add_argument("--devices", type=int, metavar="N", help="how many devices there will be")
    parser.add_argument("--device", metavar="NAME", help="a100, h100, h200, b200, tpu-v5e, tpu-v5p or cpu")
    parser.add_argument("--memory", metavar="SIZE", help="the most that a device may keep, such as 80GB")
    parser.add_argument("--cores", type=int, metavar="N", help="with cpu: cores that all devices share, by default all")
    parser.add_argument("--global-batch", type=int, metavar="ROWS", help="rows per step, by default the config's")
    parser.add_argument(
        "--costs",
        metavar="FILE",
        help="in place of formulae, costs measured by `jaxpipe profile`; or the word "
        "compiled: those that XLA counts in one block",
    )
    for name, what in (
        ("schedule", "schedules of the catalogue"),
        ("remat", "of none, full, all"),
    ):
        parser.add_argument(f"--{name}", nargs="+", metavar=name.upper(), help=f"try only these {what}")
    for name in ("pipe", "repeats", "data", "fsdp", "tensor", "rows", "microbatches"):
        parser.add_argument(f"--{name}", type=int, nargs="+", metavar="N", help=f"try only these values of {name}")
    parser.add_argument("--pin", nargs="+", metavar="BLOCK:STAGE", help="blocks that must be in a given stage")
    parser.add_argument("--equal", action="store_true", help="only stages with equal numbers of blocks")
    parser.add_argument("--explain", action="store_true", help="say where the step goes and what one change would buy")
    parser.add_argument("--out", metavar="FILE", help=f"write a file that ends in {', '.join(SUFFIXES)}")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command. Every wrong input is a `JaxpipeError`."""
    suffix = _check(options)
    from jaxpipe.measure import planning
    from jaxpipe.plan import explain, report, search

    config = _config(options)
    device, costs, space = _device(options, config)
    problem = planning.ask(config, device, options.devices, batch=options.global_batch, space=space, costs=costs)
    answer = search(problem)
    if answer.best is None:
        raise ConfigError(planning.nothing_fits(answer))
    parts = explain.parts(problem, answer.best) if options.explain else []
    changes = list(explain.changes(problem, answer.best)) if options.explain else []
    if options.json:
        print(json.dumps(report.answer_numbers(answer, parts, changes), indent=1))
    else:
        print(report.text(answer))
        if options.explain:
            print(report.explained(parts, changes, answer.best))
    if suffix is not None:
        _write(Path(options.out), suffix, config, answer, (parts, changes))
        if not options.json:
            print(f"\nwrote {options.out}" + (f"; {_command(options)}" if suffix == ".toml" else ""))
    return 0


def _command(options: argparse.Namespace) -> str:
    """What runs the plan; one for an earlier run goes on from its newest checkpoint, in a folder of its own."""
    if options.source is None:
        return f"jaxpipe train {options.out} runs it"
    folder = Path(options.source)
    own = folder.with_name(f"{folder.name}-on-{options.devices}")
    return f"jaxpipe train {options.out} resume={folder} train.out={own} goes on with it"


def _check(options: argparse.Namespace) -> str | None:
    """What nobody behind this door looks at; the ending of --out."""
    if (options.config is None) == (options.source is None):
        what = "CONFIG and --from exclude each other" if options.config else "nothing to plan for"
        raise ConfigError(f"{what}; try jaxpipe plan configs/gpt2-124m.toml --devices 8 --device h100")
    if options.devices is None:
        raise ConfigError("--devices must be given; try --devices 8")
    for name in ("devices", "global_batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1; try 1")
    if options.device is None and options.costs in (None, "compiled"):
        raise ConfigError("--device must be given, or --costs with a measured profile; try --device h100")
    for name in ("pipe", "repeats", "data", "fsdp", "tensor", "rows", "microbatches"):
        for value in getattr(options, name) or ():
            if value < 1:
                raise ConfigError(f"--{name} {value} must be at least 1; try 1")
    if options.out is None:
        return None
    import difflib

    own = Path(options.out).suffix
    if own.lower() not in SUFFIXES:
        near = difflib.get_close_matches(own.lower(), SUFFIXES, n=1, cutoff=0.0)[0] if own else SUFFIXES[0]
        near = options.out.removesuffix(own) + near
        raise ConfigError(f"--out {options.out!r} must end in one of {', '.join(SUFFIXES)}; try {near!r}")
    return own.lower()


def _config(options: argparse.Namespace) -> "Config":
    from jaxpipe.train import load

    if options.source is None:
        return load(options.config, options.overrides)
    folder = Path(options.source)
    for place in (folder, *folder.absolute().parents[:2]):
        if (place / "config.toml").exists():
            return load(place / "config.toml", options.overrides)
    raise ConfigError(
        f"--from {options.source!r} holds no config.toml, nor do the two folders above; try a run's folder"
    )


def _device(options: argparse.Namespace, config: "Config") -> "tuple[DeviceSpec, Costing | None, Space]":
    from jaxpipe.plan import find_device
    from jaxpipe.plan.device import MEMORY_FRACTION

    memory = _bytes(options.memory) if options.memory is not None else None
    space = _space(options)
    if options.costs is None:
        return find_device(options.device, memory_bytes=memory, cores=_cores(options, options.device)), None, space
    if options.costs == "compiled":
        device = find_device(options.device, memory_bytes=memory, cores=_cores(options, options.device))
        return device, _compiled(config, device, space), replace(space, rows=space.rows or _rows(config), tensor=(1,))
    from jaxpipe.measure.profile import read_profile

    profile = read_profile(options.costs)
    name = options.device or profile.device
    if find_device(name).name != profile.device:
        raise ConfigError(
            f"--device {name!r} but {options.costs} was measured on {profile.device!r}; leave --device out"
        )
    device = find_device(name, memory_bytes=memory, cores=_cores(options, name, profile.cores))
    device = replace(device, memory_bytes_per_s=profile.traffic_bytes_per_s / MEMORY_FRACTION)
    return device, profile.costing(config, options.costs), profile.within(space)


def _compiled(config: "Config", device: "DeviceSpec", space: "Space") -> "Costing":
    """Costs that XLA counts, compiled when they are asked for."""
    from functools import cache

    from jaxpipe.measure.compiled import compiled_costs
    from jaxpipe.measure.targets import mesh_of

    if space.tensor not in (None, (1,)):
        raise ConfigError(f"--tensor {space.tensor[-1]} needs costs by formula; try --tensor 1, or leave --costs out")
    mesh = mesh_of(device)
    counted = cache(lambda rows: compiled_costs(config, device, rows, tuple(space.remats), mesh))
    return lambda rows, tensor: counted(rows)


def _rows(config: "Config") -> tuple[int, ...]:
    """The config's own microbatches."""
    return (max(1, config.train.batch_size // (config.schedule.microbatches * config.mesh.data * config.mesh.fsdp)),)


def _cores(options: argparse.Namespace, name: str, measured: int | None = None) -> int | None:
    """The cores that simulated devices share."""
    if options.cores is not None or not name.lower().startswith("cpu"):
        return options.cores
    from jaxpipe.plan.device import num_cores

    return measured or num_cores()


def _bytes(text: str) -> float:
    found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    unit = found.group(2).upper() if found else ""
    try:
        return float(found.group(1)) * UNITS[unit] if found else float("nan") * UNITS["?"]
    except (KeyError, ValueError):
        raise ConfigError(f"--memory {text!r} must be a number with one of B, MB, GB, GiB; try 80GB") from None


def _space(options: argparse.Namespace) -> "Space":
    from jaxpipe.plan import Space
    from jaxpipe.plan.cost import REMATS
    from jaxpipe.plan.problem import SCHEDULES

    space = Space(split="equal" if options.equal else "any", pinned=tuple(map(_pin, options.pin or ())))
    for option, values, known in (("schedule", options.schedule, SCHEDULES), ("remat", options.remat, REMATS)):
        for value in values or ():
            if value not in known:
                import difflib

                near = difflib.get_close_matches(value, known, n=1, cutoff=0.0)[0]
                raise ConfigError(f"--{option} {value!r} is not one of {', '.join(known)}; try {near!r}")
    chosen = {
        name: getattr(options, name) for name in ("pipe", "repeats", "data", "fsdp", "tensor", "rows", "microbatches")
    }
    chosen |= {"schedules": options.schedule, "remats": options.remat}
    return replace(space, **{name: tuple(values) for name, values in chosen.items() if values})


def _pin(text: str) -> tuple[int, int]:
    block, colon, stage = text.partition(":")
    if not colon or not block.isdigit() or not stage.isdigit():
        raise ConfigError(f"--pin {text!r} must be BLOCK:STAGE, both counted from 0; try 0:0")
    return int(block), int(stage)


def _write(path: Path, suffix: str, config: "Config", answer: "Answer", more: tuple) -> None:
    from jaxpipe.measure.planning import planned
    from jaxpipe.plan import report

    assert answer.best is not None
    if suffix == ".toml":
        head = report.comments(answer.best, answer.problem.device.name, answer.problem.devices)
        content = f"{head}\n{planned(config, answer.best).to_toml()}"
    elif suffix == ".json":
        content = json.dumps(report.answer_numbers(answer, *more), indent=1)
    else:
        content = report.page(answer, *more)
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {str(path)!r} cannot be written: {error.strerror}") from error
