"""Connections: how many there may be, and how long each may keep the server waiting.

uvicorn bounds requests, not connections: one that sends nothing, or half of a head, stays for ever, and when the
process has no file handle left nobody is answered any more.
"""

import asyncio
import json
import os
import resource
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxpipe.serve.requests.limits import Limits
from jaxpipe.serve.requests.problem import Problem

READ_BYTES = 16 << 10
"""Read of a connection at a time. A body can come in chunks of one byte, which take long to take apart."""
AT_ONCE = 4
"""Connections taken on before the event loop does anything else, such as to close those that are too many."""
SPARE_FILES = 8 * AT_ONCE
"""File handles left to those that are not closed yet, and to everything else."""
PHRASES = {400: b"Bad Request", 408: b"Request Timeout", 503: b"Service Unavailable"}


class Connection(H11Protocol):
    """A connection that closes when its client keeps the server waiting.

    While there are as many connections as may be, a new one takes the place of the one that has waited longest for its
    client: for a request, the rest of one, or the next. Requests that have arrived whole are finished in any case.
    """

    limits: Limits
    most: int
    _waits_since: float
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.max_size = READ_BYTES
        self._waits_since = self.loop.time()
        if len(self.connections) > self.most and not self._make_room():
            self._refuse(Problem(503, f"{self.most} requests are in progress on as many connections", code="busy"))
            return
        self._wait(self.limits.head_s, self._headless)

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._wait_no_more()
        elif self._timer is None and (before is None or before.response_complete):
            self._wait(self.limits.head_s, self._headless)  # the first part of another head

    def on_response_complete(self) -> None:
        self._waits_since = self.loop.time()
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._wait(self.limits.head_s, self._headless)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait(self.limits.body_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._wait_no_more()

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()  # a second answer would be read as part of the first
        else:
            self._refuse(Problem(400, msg))

    @property
    def waits(self) -> bool:
        """Whether the client has to do something next."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def _make_room(self) -> bool:
        """Closes the connection that has waited longest; whether there was one."""
        others = [each for each in self.connections if isinstance(each, Connection) and each is not self and each.waits]
        if not others:
            return False
        oldest = min(others, key=lambda each: each._waits_since)
        self.connections.discard(oldest)  # it counts no more, though its end comes a moment later
        oldest.transport.abort()
        return True

    def _headless(self) -> None:
        if self.conn.their_state is h11.IDLE:
            self._refuse(Problem(408, f"the head of a request did not arrive within {self.limits.head_s:g} s"))

    def _refuse(self, problem: Problem) -> None:
        """Answers without having read a request, and closes."""
        self._wait_no_more()
        body = json.dumps(problem.body()).encode()
        head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        self.transport.write(head % (problem.status, PHRASES[problem.status], len(body)) + body)
        self.transport.close()

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        self._wait_no_more()
        self._timer = self.loop.call_later(seconds, then)

    def _wait_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def connection_class(limits: Limits) -> type[Connection]:
    """The class of a server's connections, for as many as limits and file handles allow."""
    return type("Connection", (Connection,), {"limits": limits, "most": min(limits.connections, _free_files())})


def _free_files() -> int:
    """File handles that connections may take; as many as the system grants are asked for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or soft < hard:
        wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    try:
        used = len(os.listdir("/dev/fd"))
    except OSError:
        used = 64
    return max(1, (1 << 16 if soft == resource.RLIM_INFINITY else soft) - used - SPARE_FILES)
