"""The command line: parses, delegates, and turns the end of a run into an exit code.

Exit codes: 0 done, 1 failed, 2 bad arguments or config, 3 stopped early by a signal, saved, resumable.
"""

import argparse
import sys
from collections.abc import Sequence

from jaxpipe import __version__, cli_bench, cli_checkpoint, cli_eval, cli_schedule
from jaxpipe.errors import JaxpipeError

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command `jaxpipe`.

    Args:
        arguments: Words after the command's name; by default the process's own.

    Returns:
        The exit code. Wrong input ends in one line on standard error, never in a traceback.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except JaxpipeError as error:
        print(f"jaxpipe: error: {error}", file=sys.stderr)
        return FAILED if _happened_in_training(error) else BAD_INPUT
    except KeyboardInterrupt:
        print("jaxpipe: stopped by SIGINT", file=sys.stderr)
        return STOPPED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxpipe", description="Pipeline-parallel training for JAX.")
    parser.add_argument("--version", action="version", version=f"jaxpipe {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train a model from a config file",
        description="Trains a model and writes metrics, curves, timetable, checkpoints and config to train.out. "
        "A run that was stopped or killed goes on where it was saved.",
        epilog="exit codes: 0 done, 1 failed or not saved, 2 bad arguments or config, 3 stopped early by Ctrl-C or "
        "SIGTERM: the same command goes on",
    )
    train.add_argument("config", metavar="CONFIG", help="TOML file with sections model, data, mesh, schedule, …")
    overrides = "such as train.steps=100 or resume=PATH; the last one wins"
    train.add_argument("overrides", metavar="key=value", nargs="*", help=overrides)
    train.set_defaults(run=_train)
    cli_schedule.register(commands)
    cli_bench.register(commands)
    cli_eval.register(commands)
    cli_checkpoint.register(commands)
    return parser


def _train(options: argparse.Namespace) -> int:
    from jaxpipe.train import load, train
    from jaxpipe.train.terminal import terminal_report

    report = terminal_report()
    config = load(options.config, options.overrides)
    result = train(config, report=report)
    if result.stopped_by:
        what = "the same command goes on" if result.saved else "the last state was not saved"
        report.note(f"stopped    by {result.stopped_by} after {result.step} steps; {result.out} has the run, {what}")
        return FAILED if result.saved is False else STOPPED
    if result.sample is not None:
        report.note(f"\n--- sample ---\n{result.sample}\n--------------\n")
    files = ", ".join(sorted(path.name for path in result.out.iterdir()))
    unit = config.data.unit
    report.note(f"done       validation loss {result.val_loss:.3f} nats per {unit}; {result.out} holds {files}")
    if result.saved is False:
        report.note("failed     the last state was not saved, see the warnings above")
        return FAILED
    return DONE


def _happened_in_training(error: JaxpipeError) -> bool:
    health = sys.modules.get("jaxpipe.train.health")  # not loaded, and jax neither, if nothing was trained
    return health is not None and isinstance(error, health.NonFiniteError)
