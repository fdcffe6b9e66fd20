"""`jaxpipe profile`: times one block of each kind on the present devices, for the planner."""

import argparse
from pathlib import Path

from jaxpipe.errors import ConfigError

EXAMPLES = """examples:
  jaxpipe profile configs/quickstart.toml
  jaxpipe profile configs/quickstart.toml --rows 1 2 4 --remat none full --out profile.json
  jaxpipe plan configs/quickstart.toml --devices 4 --costs profile.json

exit codes: 0 done, 2 bad arguments or config"""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the parser of `jaxpipe`."""
    parser = commands.add_parser(
        "profile",
        help="time one block of each kind on the present devices",
        description="Measures what `jaxpipe plan --costs` and `schedule.profile` read: forward, input and weight "
        "gradient of one block of each kind, embedding and head, and hops by the size of the message.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="TOML file of a run")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="such as model.d_model=512")
    parser.add_argument(
        "--rows", type=int, nargs="+", metavar="N", help="rows of a microbatch, by default the config's"
    )
    parser.add_argument("--remat", nargs="+", choices=("none", "full", "all"), default=["none", "full", "all"])
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="how often each is timed, by default 7")
    parser.add_argument("--out", default="profile.json", metavar="FILE", help="by default profile.json")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command. Every wrong input is a `JaxpipeError`."""
    for name, values in (("rows", options.rows or ()), ("rounds", [options.rounds])):
        for value in values:
            if value < 1:
                raise ConfigError(f"--{name} {value} must be at least 1; try 1")
    from jaxpipe.measure.bench.memory import keep_freed_memory
    from jaxpipe.measure.planning import present_device
    from jaxpipe.measure.profiling import profile
    from jaxpipe.runtime.layout.mesh import simulate_devices
    from jaxpipe.train import load

    config = load(options.config, options.overrides)
    if config.mesh.simulate:
        simulate_devices(config.mesh.simulate)
    keep_freed_memory()
    own = config.train.batch_size // (config.schedule.microbatches * config.mesh.data * config.mesh.fsdp)
    found = profile(
        config,
        present_device(),
        rows=sorted(set(options.rows or [own])),
        remats=tuple(options.remat),
        rounds=options.rounds,
        note=lambda text: print(text, flush=True),
    )
    try:
        Path(options.out).write_text(found.to_json(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {options.out!r} cannot be written: {error.strerror}") from error
    print(f"wrote {options.out}")
    return 0
