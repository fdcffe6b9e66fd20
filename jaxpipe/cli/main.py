"""The command line: parses, delegates, and turns the end of a run into an exit code.

Exit codes: 0 done, 1 failed, 2 bad arguments or config, 3 stopped early by a signal, saved, resumable.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from jaxpipe import __version__
from jaxpipe.cli import (
    bench as cli_bench,
    checkpoint as cli_checkpoint,
    config as cli_config,
    convert as cli_convert,
    eval as cli_eval,
    generate as cli_generate,
    plan as cli_plan,
    processes as cli_processes,
    profile as cli_profile,
    schedule as cli_schedule,
    serve as cli_serve,
)
from jaxpipe.errors import JaxpipeError, UnavailableError
from jaxpipe.reader import ends_unread
from jaxpipe.screen import screened

if TYPE_CHECKING:
    from jaxpipe.hosts import Crew

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 3


@ends_unread
@screened()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command `jaxpipe`.

    Args:
        arguments: Words after the command's name; by default the process's own.

    Returns:
        The exit code. Wrong input ends in one line on standard error, never in a traceback; output that nobody reads
        any more ends the command without a word.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except JaxpipeError as error:
        print(f"jaxpipe: error: {error}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        print("jaxpipe: stopped by SIGINT", file=sys.stderr)
        return STOPPED


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, with the nearest word that would do."""

    def error(self, message: str) -> NoReturn:
        """Prints the line and exits with 2."""
        if chosen := re.fullmatch(r"argument ([^:]+): invalid choice: '?(.*?)'? \(choose from (.*)\)", message):
            known = [word.strip(" '") for word in chosen[3].split(",")]
            message = f"{chosen[2]!r} is no {chosen[1]}; {_did_you_mean(chosen[2], known)}"
        elif unknown := re.fullmatch(r"unrecognized arguments: (.*)", message):
            word = unknown[1].split()[0].partition("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            message = f"unknown argument {unknown[1]}; {_did_you_mean(word, known)}"
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def parse_args(self, args=None, namespace=None):
        """As the base class, but a command's own options are suggested for one that it does not know."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            getattr(found, "parser", self).error(f"unrecognized arguments: {' '.join(unknown)}")
        return found


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="jaxpipe", description="Pipeline-parallel training for JAX.")
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
    train.add_argument("--help-config", action=_HelpConfig, nargs=0, help="print every key of a config, and exit")
    train.add_argument("config", metavar="CONFIG", help="TOML file with sections model, data, mesh, schedule, …")
    overrides = "such as train.steps=100 or resume=PATH; the last one wins"
    train.add_argument("overrides", metavar="key=value", nargs="*", help=overrides)
    cli_processes.add_options(train)
    train.set_defaults(run=_train)
    model = (cli_eval, cli_checkpoint, cli_convert, cli_generate, cli_serve)
    for command in (cli_config, cli_schedule, cli_bench, cli_plan, cli_profile, *model):
        command.register(commands)
    _know_their_options(commands)
    return parser


def _know_their_options(commands: "argparse._SubParsersAction[Any]"):
    for command in commands.choices.values():
        command.set_defaults(parser=command)
        for action in command._actions:
            if isinstance(action, argparse._SubParsersAction):
                _know_their_options(action)


class _HelpConfig(argparse.Action):
    """Prints the keys of a config, as ``--help`` prints options."""

    def __call__(self, parser, namespace, values, option_string=None):
        cli_config.print_keys()
        parser.exit()


def _train(options: argparse.Namespace) -> int:
    crew = cli_processes.crew(options, exit_code)
    if crew is None:
        return _train_here(options)
    with crew:
        return _train_here(options, crew)


def _train_here(options: argparse.Namespace, crew: "Crew | None" = None) -> int:
    from jaxpipe.checkpoint.owned import OWN
    from jaxpipe.terminal import Silent, terminal_report
    from jaxpipe.train import load, train

    report = terminal_report() if crew is None or crew.lead else Silent()
    config = load(options.config, options.overrides)
    if crew is not None:
        cli_processes.start_jax(crew, config, options)
    result = train(config, report=report, crew=crew)
    if result.stopped_by:
        what = "the same command goes on" if result.saved else "the last state was not saved"
        report.note(f"stopped    by {result.stopped_by} after {result.step} steps; {result.out} has the run, {what}")
        return FAILED if result.saved is False else STOPPED
    if result.sample is not None:
        report.note(f"\n--- sample ---\n{result.sample}\n--------------\n")
    if crew is not None and not crew.lead:
        return FAILED if result.saved is False else DONE
    files = ", ".join(sorted(path.name for path in result.out.iterdir() if path.name != OWN))
    unit = config.data.unit
    report.note(f"done       validation loss {result.val_loss:.3f} nats per {unit}; {result.out} holds {files}")
    if result.saved is False:
        report.note("failed     the last state was not saved, see the warnings above")
        return FAILED
    return DONE


def exit_code(error: BaseException) -> int:
    """Whether an error is one of the input or happened later, with input that was good."""
    later = [("jaxpipe.train.health", "NonFiniteError"), ("jaxpipe.hosts.line", "LineError")]
    modules = [(sys.modules.get(module), name) for module, name in later]  # loaded only by those that need them
    if isinstance(error, UnavailableError) or not isinstance(error, JaxpipeError):
        return FAILED
    if any(isinstance(error, getattr(m, name)) for m, name in modules if m):
        return FAILED
    return BAD_INPUT
