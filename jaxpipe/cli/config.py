"""`jaxpipe config`: what a run's file may say, what it says with every default, and whether it can be read."""

import argparse
import shutil

EXAMPLES = """examples:
  jaxpipe config keys                      # every key: what it means, what it may be, its default
  jaxpipe config keys optim train.steps    # those of a section, or one
  jaxpipe config show configs/quickstart.toml train.steps=100
  jaxpipe config check my.toml

exit codes: 0 done, 2 bad arguments or config"""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the parser of `jaxpipe`."""
    parser = commands.add_parser(
        "config",
        help="explain, fill in or check a config file",
        description="Explains the keys of a config, fills in its defaults, or checks it. No device is touched.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(required=True, metavar="WHAT")
    listed = kinds.add_parser("keys", help="every key: what it means, what it may be, its default")
    listed.add_argument("names", metavar="NAME", nargs="*", help="a section, or section.key; by default all")
    listed.add_argument("--markdown", action="store_true", help="as the page docs/config.md")
    listed.set_defaults(run=_keys)
    for name, run, what in (
        ("show", _show, "print the whole run, defaults filled in"),
        ("check", _check, "say whether the file can be read, or what is wrong with it"),
    ):
        one = kinds.add_parser(name, help=what)
        one.add_argument("config", metavar="CONFIG", help="TOML file of a run")
        one.add_argument("overrides", metavar="key=value", nargs="*", help="such as train.steps=100")
        one.set_defaults(run=run)


def print_keys() -> None:
    """Prints every key, for ``jaxpipe train --help-config``."""
    from jaxpipe.config.reference import text

    print(text(width=min(shutil.get_terminal_size().columns, 120)))


def _keys(options: argparse.Namespace) -> int:
    from jaxpipe.config import reference

    if options.markdown:
        print(reference.markdown(), end="")
    else:
        print(reference.text(options.names, width=min(shutil.get_terminal_size().columns, 120)))
    return 0


def _show(options: argparse.Namespace) -> int:
    from jaxpipe.train import load

    print(load(options.config, options.overrides).to_toml(), end="")
    return 0


def _check(options: argparse.Namespace) -> int:
    from jaxpipe.train import load

    config = load(options.config, options.overrides)
    mesh, schedule = config.mesh, config.schedule
    devices = mesh.pipe * mesh.data * mesh.fsdp * mesh.tensor
    print(
        f"{options.config}: {config.train.steps} steps of {config.train.batch_size} sequences of {config.train.seq_len}"
        f" on {devices} device{'s' * (devices > 1)}, {schedule.name} with {schedule.microbatches} microbatches; "
        "`jaxpipe plan` says what it takes"
    )
    return 0
