"""Keeps Orbax from printing: what matters of a failed save or read is raised, and told in one line.

Of a save that fails in many places one error is raised. The others come later, from threads of their own: asyncio logs
them, or they report to an event loop that Orbax has closed. Nobody needs them any more.
"""

import gc
import inspect
import logging
import sys
import traceback
import warnings
from typing import Any


def hush() -> None:
    """Keeps Orbax from logging, and its stragglers from being shown. May be called again."""
    for name in ("absl", "asyncio"):
        logger = logging.getLogger(name)
        if not any(isinstance(own, _NotOrbax) for own in logger.filters):
            logger.addFilter(_NotOrbax())
    if not isinstance(sys.unraisablehook, _NoStragglers):
        sys.unraisablehook = _NoStragglers(sys.unraisablehook)


def forget_failures() -> None:
    """Lets go of what a failed save or read left behind, whose coroutines warn that nobody ran them."""
    hush()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
        gc.collect()


def in_one_line(error: BaseException, most: int = 200) -> str:
    """What an error of Orbax says, without what it prints of Python's own objects."""
    text = " ".join(str(error).split()).partition("<bound method")[0].removesuffix("See full TensorStore details: ")
    return text.rstrip() if len(text) <= most else f"{text[:most]}…"


class _NotOrbax(logging.Filter):
    """Drops Orbax's own log lines, and asyncio's about what Orbax ran."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name != "asyncio":
            return "orbax" not in record.pathname
        error = record.exc_info[1] if record.exc_info else None
        frames = traceback.walk_tb(error.__traceback__) if error else ()
        # A task's message says what it ran, a future's does not: there the error tells where it came from.
        return "orbax" not in record.getMessage() and all("orbax" not in at.f_code.co_filename for at, _ in frames)


class _NoStragglers:
    """A hook for unraisable errors that knows those of closed event loops, and leaves the rest to the hook before."""

    def __init__(self, before: Any):
        self._before = before

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed" and not inspect.iscoroutine(unraisable.object):
            self._before(unraisable)
