"""The threads in which prompts become tokens: work that takes time, and that may hang.

A chat template is a program that came with the model, and a tokenizer's patterns can take exponential time for a text
that a client chose. So this work has threads of its own, a bounded number of them, and a deadline. A thread that hangs
is asked to end, which Python code does and foreign code may not; it is a daemon, so that it does not keep the process.
"""

import asyncio
import ctypes
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from jaxpipe.serve.requests.problem import Problem

T = TypeVar("T")


class Pool:
    """Runs work in threads. Only the event loop's thread calls it.

    Args:
        lanes: Pieces of work at a time. One that takes longer than `patience_s` leaves its lane to others.
        most: Threads in all; while so many hang, nothing is taken on.
        patience_s: See `lanes`.
    """

    def __init__(self, lanes: int = 4, most: int = 32, patience_s: float = 1.0):
        self._lanes = asyncio.Semaphore(lanes)
        self._most, self._patience_s = most, patience_s
        self._threads = 0
        self._lock = threading.Lock()

    async def run(self, work: Callable[[], T], limit_s: float) -> T:
        """The outcome of `work`, called in another thread.

        Args:
            work: What to do.
            limit_s: How long it may take, the wait for a thread included.

        Raises:
            Problem: 504, it took longer; 503, too many threads hang.
            Exception: What `work` raised.
        """
        late = Problem(504, f"the prompt was not read within {limit_s:g} s", code="prompt_timeout")
        end = asyncio.get_running_loop().time() + limit_s
        try:
            async with asyncio.timeout_at(end):
                await self._lanes.acquire()
        except TimeoutError:
            raise late from None
        job = None
        try:
            try:
                job = self._start(work)
                await asyncio.wait([job.outcome], timeout=min(self._patience_s, _left(end)))
            finally:
                self._lanes.release()
            await asyncio.wait([job.outcome], timeout=_left(end))
            if not job.outcome.done():
                raise late
            return job.outcome.result()
        finally:
            if job is not None:
                job.end()

    def _start(self, work: Callable[[], T]) -> "_Job[T]":
        with self._lock:
            if self._threads >= self._most:
                raise Problem(503, "too many prompts hang", code="busy", retry_after_s=1)
            self._threads += 1
        return _Job(work, self._over)

    def _over(self):
        with self._lock:
            self._threads -= 1


class _Job(Generic[T]):
    """One piece of work in a thread of its own.

    Args:
        work: What to do.
        over: Is called in the thread when it ends.
    """

    def __init__(self, work: Callable[[], T], over: Callable[[], None]):
        self._loop = asyncio.get_running_loop()
        self.outcome: asyncio.Future[T] = self._loop.create_future()
        self._work, self._over = work, over
        self._lock, self._ended = threading.Lock(), False
        self._thread = threading.Thread(target=self._run, name="jaxpipe-prompt", daemon=True)
        self._thread.start()

    def end(self):
        """Asks the thread to end, if it has not."""
        self.outcome.cancel()
        with self._lock:
            if not self._ended and self._thread.ident is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread.ident), ctypes.py_object(_Late))

    def _run(self):
        try:
            value, error = None, None
            try:
                value = self._work()
            except Exception as raised:
                error = raised
            except BaseException as raised:  # a panic of a library in Rust
                error = RuntimeError(f"{type(raised).__name__}: {raised}")
            with self._lock:
                self._ended = True
            self._loop.call_soon_threadsafe(self._tell, value, error)
        except (_Late, RuntimeError):
            pass  # asked to end, or the loop is closed: nobody waits for it
        finally:
            self._over()

    def _tell(self, value: Any, error: Exception | None):
        if self.outcome.done():
            return
        if error is None:
            self.outcome.set_result(value)
        else:
            self.outcome.set_exception(error)


class _Late(BaseException):
    """Ends a thread whose outcome nobody waits for any more."""


def _left(end: float) -> float:
    return max(0.0, end - asyncio.get_running_loop().time())
