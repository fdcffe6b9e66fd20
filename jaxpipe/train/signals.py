"""Ctrl-C and SIGTERM as a question the loop can ask between two steps."""

import signal
import threading
import time
from types import FrameType


class StopSignal:
    """While entered, the first SIGINT or SIGTERM is noted and the next one acts as it always did.

    Handlers can only be set in the main thread; in another thread nothing is noted.

    Attributes:
        name: ``SIGINT`` or ``SIGTERM`` once one has come, else None.
        at: `time.monotonic` when it came, else None.
    """

    def __init__(self):
        self.name: str | None = None
        self.at: float | None = None
        self._before = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        self._restore()

    def _note(self, number: int, frame: FrameType | None):
        self.name, self.at = signal.Signals(number).name, time.monotonic()
        self._restore()

    def _restore(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
