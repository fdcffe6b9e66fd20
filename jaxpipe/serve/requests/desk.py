"""The requests in progress: how many may be, and how they end when the server does."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from jaxpipe.serve.requests.limits import Limits
from jaxpipe.serve.requests.mailbox import Mailbox
from jaxpipe.serve.requests.problem import Problem

RETRY_AFTER_S = 1


class Desk:
    """Admits requests. Only the event loop's thread touches it.

    Args:
        limits: Of what is admitted.

    Attributes:
        stopping: Whether the server is about to end and admits nothing.
        cut_off: Requests that were ended because the server did.
    """

    def __init__(self, limits: Limits):
        self.stopping = False
        self.cut_off = 0
        self._limits = limits
        self._waiting: set[Mailbox] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    @contextmanager
    def admit(self) -> Iterator[Mailbox]:
        """A mailbox for one request, which is in progress until the context ends or its time is over.

        Raises:
            Problem: 429, too many are; 503, the server stops.
        """
        if refusal := self.refusal():
            raise refusal
        most = self._limits.requests
        if len(self) >= most:
            raise Problem(
                429, f"{most} requests are in progress, the most there may be", code="busy", retry_after_s=RETRY_AFTER_S
            )
        mailbox = Mailbox()
        seconds = self._limits.request_s
        late = Problem(504, f"the request was not done within {seconds:g} s", code="timeout")
        timer = asyncio.get_running_loop().call_later(seconds, mailbox.fail, late)
        self._waiting.add(mailbox)
        try:
            yield mailbox
        finally:
            self._waiting.discard(mailbox)
            timer.cancel()

    def cut(self):
        """Ends all requests in progress."""
        self.cut_off += len(self)
        for mailbox in self._waiting:
            mailbox.fail(_stopping())

    def refusal(self) -> Problem | None:
        """What is answered to all requests now; None: they are looked at."""
        return _stopping() if self.stopping else None


def _stopping() -> Problem:
    return Problem(503, "the server is stopping", code="stopping", retry_after_s=RETRY_AFTER_S)
