"""The options of `jaxpipe train` for several processes."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from jaxpipe.errors import ConfigError

if TYPE_CHECKING:
    from jaxpipe.hosts import Crew
    from jaxpipe.train import Config

START_TIMEOUT_S, SILENCE_TIMEOUT_S = 300.0, 60.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    group = parser.add_argument_group(
        "several processes", "the same command in each; process 0 writes and reports; see docs/many-processes.md"
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="train together with the other processes that SLURM, Open MPI or Kubernetes started",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is, if no cluster says so")
    group.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0 to N-1")
    group.add_argument(
        "--start-timeout", type=float, metavar="SECONDS", help=f"wait so long for all of them ({START_TIMEOUT_S:g})"
    )
    group.add_argument(
        "--silence-timeout",
        type=float,
        metavar="SECONDS",
        help=f"end when one has not been heard of for so long ({SILENCE_TIMEOUT_S:g})",
    )


def crew(options: argparse.Namespace, exit_code: Callable[[BaseException], int]) -> "Crew | None":
    """Waits for all processes of the run; None where there is only this one."""
    given = options.coordinator, options.num_processes, options.process_id
    if not options.distributed and given == (None, None, None):
        for name in ("start_timeout", "silence_timeout"):
            if (value := getattr(options, name)) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} {value:g} has no effect on one process; leave it out or add --distributed")
        return None
    from jaxpipe.hosts import find_place, join

    place = find_place(*given, timeout_s=_start_timeout_s(options))
    silence_s = SILENCE_TIMEOUT_S if options.silence_timeout is None else options.silence_timeout
    return join(place, start_timeout_s=_start_timeout_s(options), silence_s=silence_s, exit_code=exit_code)


def start_jax(crew: "Crew", config: "Config", options: argparse.Namespace) -> None:
    """Starts JAX with the devices of all processes."""
    from jaxpipe.hosts import start_jax

    start_jax(crew, config, _start_timeout_s(options))


def _start_timeout_s(options: argparse.Namespace) -> float:
    return START_TIMEOUT_S if options.start_timeout is None else options.start_timeout
