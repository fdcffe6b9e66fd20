"""A run that hangs ends itself; a run that lives says so in a file.

The watchdog is a thread that compares the time of the last sign of life with the clock. When it gives up, the main
thread is stuck in a call that cannot be interrupted, so it ends the process without asking it.
"""

import faulthandler
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax

FAILED = 1
"""Exit code of a run that hung: whoever supervises it starts it again."""


class Heartbeat:
    """Step and time of the run in a file, at most once a second, replaced as a whole.

    Args:
        path: The file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._written = 0.0

    def beat(self, step: int, *, now: bool = False) -> None:
        """Writes the file. A disk that is full or read-only is no reason to stop."""
        if not now and time.monotonic() - self._written < 1.0:
            return
        self._written = time.monotonic()
        part = self.path.with_suffix(".part")
        try:
            part.write_text(json.dumps({"step": step, "time": time.time(), "pid": os.getpid()}), encoding="utf-8")
            part.replace(self.path)
        except OSError:
            return


class Watchdog:
    """While entered, ends the process when nothing happens for too long after the first sign of life.

    Args:
        timeout_s: The longest time between two signs of life; 0 means any.
        log: File that takes stacks and the state of the devices.
        grace_s: The longest time from a stop signal to the end of the run; 0 means any.
        stopped_at: ``() -> time.monotonic()`` of the stop signal, or None.
    """

    def __init__(self, timeout_s: float, log: Path, *, grace_s: float = 0.0, stopped_at: Callable = lambda: None):
        self._timeout_s, self._grace_s, self._log, self._stopped_at = timeout_s, grace_s, log, stopped_at
        self._alive, self._doing = math.inf, "starting"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def alive(self, doing: str) -> None:
        """A sign of life, and what comes next."""
        self._alive, self._doing = time.monotonic(), doing

    def __enter__(self) -> "Watchdog":
        if self._timeout_s or self._grace_s:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        shortest = min(limit for limit in (self._timeout_s, self._grace_s) if limit)
        while not self._over.wait(min(1.0, shortest / 4)):
            now, stopped = time.monotonic(), self._stopped_at()
            if self._timeout_s and now - self._alive > self._timeout_s:
                self._give_up(f"no sign of life for watchdog.timeout_s={self._timeout_s:g} s while {self._doing}")
            if self._grace_s and stopped is not None and now - stopped > self._grace_s:
                self._give_up(f"not stopped within checkpoint.grace_s={self._grace_s:g} s while {self._doing}")

    def _give_up(self, reason: str) -> None:
        print(f"jaxpipe: error: {reason}; stacks are in {self._log}", file=sys.stderr, flush=True)
        try:
            with self._log.open("a", encoding="utf-8") as file:
                print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {reason}, process {os.getpid()}", file=file, flush=True)
                faulthandler.dump_traceback(file=file, all_threads=True)
                asking = threading.Thread(target=_describe_devices, args=(file,), daemon=True)
                asking.start()
                asking.join(5.0)  # a device that hangs may not answer
                print("devices did not answer" if asking.is_alive() else "end of devices", file=file, flush=True)
        except OSError:
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        os._exit(FAILED)


def _describe_devices(file) -> None:
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        memory = ", ".join(f"{name} {stats[name]:,}" for name in ("bytes_in_use", "peak_bytes_in_use") if name in stats)
        print(f"{device.device_kind} {device.id}: {memory or 'no memory statistics'}", file=file, flush=True)
