"""The body of a request: read within limits of size and time, and decoded as strict JSON."""

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from jaxpipe.documents import shown
from jaxpipe.infer.server.limits import Limits
from jaxpipe.infer.server.problem import Problem

LINGER_BYTES, LINGER_S = 64 << 20, 2.0
"""How much of a body that nobody wants is read all the same."""
WHOLE = "jaxpipe.body_whole"
"""Key of the scope that says that the body has been read to its end."""


async def read_json(request: Request, limits: Limits) -> dict[str, Any]:
    """Reads the JSON object that a request carries.

    Raises:
        Problem: 415 for another type of content, 413 too long, 408 too slow, 400 no JSON object.
        ClientDisconnect: Nobody is there any more.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also what keeps web pages of other origins out: browsers ask before they send this type, and get no consent.
        raise Problem(415, f"Content-Type {shown(kind)} must be application/json")
    try:
        async with asyncio.timeout(limits.body_s):
            data = await _read(request, limits.body_bytes)
    except TimeoutError:
        raise Problem(408, f"the body did not arrive within {limits.body_s:g} s") from None
    return parse(data)


def parse(data: bytes) -> dict[str, Any]:
    """Decodes a JSON object.

    Example:
        >>> parse(b'{"n": 1}')
        {'n': 1}
    """
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise Problem(400, f"the body must be UTF-8 but byte {error.start} is not") from None
    except RecursionError:
        raise Problem(400, "the body is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, and whole numbers of thousands of digits
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


async def _read(request: Request, most: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > most:
        raise _too_long(most)
    parts, size = [], 0
    while not request.scope.get(WHOLE):
        parts.append(await _part(request))
        size += len(parts[-1])
        if size > most:
            raise _too_long(most)
    return b"".join(parts)


async def _part(request: Request) -> bytes:
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    request.scope[WHOLE] = not message.get("more_body", False)
    return message.get("body", b"")


def _too_long(most: int) -> Problem:
    return Problem(413, f"the body must be at most {most} bytes long", code="body_too_large")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
