"""What a command does when nobody reads its output any more: `head` has its lines, somebody left `less`."""

import os
import select
import signal
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TextIO


def ends_unread(command: Callable[..., int]) -> Callable[..., int]:
    """A command that ends without a word, and with exit code 0, once whoever read its output has seen enough."""

    @wraps(command)
    def run(*args: Any, **options: Any) -> int:
        try:
            try:
                return command(*args, **options)
            finally:
                sys.stdout.flush()  # also after --help, which argparse ends by SystemExit
        except BrokenPipeError:
            if not any([_left(stream) for stream in (sys.__stdout__, sys.__stderr__)]):
                raise  # it was another pipe
            return 0

    return run


def stop_unread(file: TextIO, text: str) -> TextIO:
    """Writes a line of a long run. Where nobody reads any more the run is stopped as by SIGTERM, which loses nothing.

    Before there is anything to lose, while nobody handles SIGTERM yet, the command ends as any other.

    Args:
        file: Where to.
        text: The line.

    Returns:
        Where to write from now on.
    """
    try:
        print(text, file=file, flush=True)
    except BrokenPipeError:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            raise
        _left(sys.__stdout__)
        os.kill(os.getpid(), signal.SIGTERM)
        return open(os.devnull, "w", encoding="utf-8")
    return file


def _left(stream: Any) -> bool:
    """Whether a stream's reader has gone; then what is still written to it, at Python's end too, goes nowhere."""
    try:
        number = stream.fileno()
        asked = select.poll()
        asked.register(number, 0)
        gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0))
    except (AttributeError, OSError, ValueError):  # no console, or not a file
        return False
    if gone:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
    return gone
