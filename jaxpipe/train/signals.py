"""Ctrl-C and SIGTERM as a question the loop can ask between two steps."""

import signal
import threading
import time
from types import FrameType

from jaxpipe.hosts.crew import Crew


class StopSignal:
    """While entered, the first SIGINT or SIGTERM is noted and the next one acts as it always did.

    Handlers can only be set in the main thread; in another thread nothing is noted.

    Args:
        crew: Other processes, which all stop at the same step.

    Attributes:
        name: ``SIGINT`` or ``SIGTERM`` once one has come, else None. With a crew: signal and process, once it is
            agreed and that step is reached.
        at: `time.monotonic` when it came to this process, else None.
    """

    def __init__(self, crew: Crew | None = None):
        self._crew = crew
        self.name: str | None = None
        self.at: float | None = None
        self._before = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        self._restore()

    def reached(self, step: int) -> bool:
        """Whether the run shall end after `step` steps. If not, the next one must begin."""
        if self._crew is not None and self._crew.reached(step):
            self.name = self._crew.stopped_by
        return self.name is not None

    def _note(self, number: int, frame: FrameType | None):
        self.at = time.monotonic()
        if self._crew is None:
            self.name = signal.Signals(number).name
        else:
            self._crew.want_stop(signal.Signals(number).name)
        self._restore()

    def _restore(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
