"""Where the pieces of one request arrive: put in by the engine's thread, taken out by the event loop.

Whatever ends a request early arrives here too, as an exception: a time-out, a client that left, a server that stops. So
there is one place where a request waits, and no thread, task or lock per request.
"""

import asyncio
from collections import deque
from collections.abc import Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")
S = TypeVar("S")


class Mailbox(Generic[T]):
    """A queue with one reader, in the event loop that makes it."""

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self._items: deque[T] = deque()
        self._end: BaseException | None = None
        self._ready = asyncio.Event()
        self._waking = False
        self._meanwhile: asyncio.Task[Any] | None = None

    def put_from_thread(self, item: T):
        """Puts in an item, from any thread; after the loop has closed nothing happens.

        The loop is woken once for all items that come before it gets to run.
        """
        self._items.append(item)
        if self._waking:
            return
        self._waking = True
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def fail(self, error: BaseException):
        """Makes the reader get `error` next, before what has not been taken yet. The first error counts."""
        if self._end is None:
            self._end = error
            self._ready.set()
            if self._meanwhile is not None:
                self._meanwhile.cancel()

    async def meanwhile(self, work: Coroutine[Any, Any, S]) -> S:
        """The outcome of `work`, which ends early where the request does.

        Raises:
            BaseException: What `fail` was given, or what `work` raised.
        """
        self._meanwhile = task = asyncio.ensure_future(work)
        if self._end is not None:
            task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            task.cancel()
            if self._end is None:
                raise
            raise self._end from None
        finally:
            self._meanwhile = None

    async def take(self) -> list[T]:
        """All items there are, at least one.

        Raises:
            BaseException: What `fail` was given.
        """
        while not self._items and self._end is None:
            self._ready.clear()
            await self._ready.wait()
        if self._end is not None:
            raise self._end
        return [self._items.popleft() for _ in range(len(self._items))]

    def _wake(self):
        self._waking = False  # before the reader looks: what is put in from now on wakes it again
        self._ready.set()
