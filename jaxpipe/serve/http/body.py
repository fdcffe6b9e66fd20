"""The body of a request: read within limits of size and time, and decoded as strict JSON."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.requests import ClientDisconnect, Request

from jaxpipe.documents import parse_json, shown
from jaxpipe.serve.requests.limits import Limits
from jaxpipe.serve.requests.problem import Problem

LINGER_BYTES, LINGER_S = 64 << 20, 2.0
"""How much of a body that nobody wants is read all the same."""
SMALL_BYTES, LONG_BODIES = 64 << 10, 16
"""A body of at most so many bytes is always read; of the longest ones so many arrive at a time."""
WHOLE = "jaxpipe.body_whole"
"""Key of the scope that says that the body has been read to its end."""


class Room:
    """The memory that bodies take while they arrive, in all. Small ones always have room.

    Args:
        limits: Of a body, of which several of the longest fit.
    """

    def __init__(self, limits: Limits):
        self._free = max(LONG_BODIES * limits.body_bytes, SMALL_BYTES)

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """A function that is told how long a body has become so far. While the context lasts it has its place.

        Raises:
            Problem: 503, from that function: others take all the room.
        """
        taken = 0

        def grow(size: int):
            nonlocal taken
            more = size - taken if size > SMALL_BYTES else 0
            if more > self._free:
                raise Problem(503, "too many long bodies arrive at a time", code="busy", retry_after_s=1)
            self._free -= more
            taken += more

        try:
            yield grow
        finally:
            self._free += taken


async def read_body(request: Request, limits: Limits, room: Room) -> bytes:
    """Reads the body of a request that carries JSON.

    Raises:
        Problem: 415 for another type of content, 413 too long, 408 too slow, 503 too many of them.
        ClientDisconnect: Nobody is there any more.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also what keeps web pages of other origins out: browsers ask before they send this type, and get no consent.
        raise Problem(415, f"Content-Type {shown(kind)} must be application/json")
    try:
        with room.share() as grow:
            async with asyncio.timeout(limits.body_s):
                return await _read(request, limits.body_bytes, grow)
    except TimeoutError:
        raise Problem(408, f"the body did not arrive within {limits.body_s:g} s") from None


def parse(data: bytes) -> dict[str, Any]:
    """Decodes a JSON object.

    Example:
        >>> parse(b'{"n": 1}')
        {'n': 1}
    """
    try:
        value = parse_json(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Problem(400, f"the body must be UTF-8 but byte {error.start} is not") from None
    except ValueError as error:
        raise Problem(400, f"the body must be JSON: {error}") from None
    if not isinstance(value, dict):
        raise Problem(400, f"the body must be a JSON object but is {shown(value)}")
    return value


async def drain(request: Request):
    """Reads and drops the rest of a body, within bounds, before an answer that does not wait for it.

    A client that is still writing would find its connection reset instead of reading the answer.
    """
    if request.scope.get(WHOLE) or "100-continue" in request.headers.get("expect", "").lower():
        return
    dropped = 0
    try:
        async with asyncio.timeout(LINGER_S):
            while dropped < LINGER_BYTES and not request.scope.get(WHOLE):
                dropped += len(await _part(request))
    except (TimeoutError, ClientDisconnect):
        pass


async def _read(request: Request, most: int, grow: Callable[[int], None]) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > most:
        raise _too_long(most)
    parts, size = [], 0
    while not request.scope.get(WHOLE):
        parts.append(await _part(request))
        size += len(parts[-1])
        if size > most:
            raise _too_long(most)
        grow(size)
    return b"".join(parts)


async def _part(request: Request) -> bytes:
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    request.scope[WHOLE] = not message.get("more_body", False)
    return message.get("body", b"")


def _too_long(most: int) -> Problem:
    return Problem(413, f"the body must be at most {most} bytes long", code="body_too_large")
