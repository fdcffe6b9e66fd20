"""One TCP connection between two processes that carries small messages: JSON objects, one per line."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from jaxpipe.documents import parse_json
from jaxpipe.errors import JaxpipeError

Message = dict[str, Any]
Kinds = Mapping[str, Mapping[str, type]]
"""Kinds of messages, each with its fields and their types."""
LONGEST = 2**22
"""Bytes of a message between processes that know each other."""
_MOST = 2**53
"""Of any whole number in a message."""


class LineError(JaxpipeError):
    """The other side is gone, or is none of ours."""


class Line:
    """Sends from any thread, receives in one.

    Args:
        sock: A connected socket; closed with the line.
        longest: Bytes of a message; a line is cut off that brings more.

    Attributes:
        longest: As given.
        heard: `time.monotonic` of the last bytes that came.
    """

    def __init__(self, sock: socket.socket, longest: int = LONGEST):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(10.0)
        self._sock, self._rest, self._lock = sock, b"", threading.Lock()
        self.longest = longest
        self.heard = time.monotonic()

    def fileno(self) -> int:
        """For `selectors`."""
        return self._sock.fileno()

    def send(self, message: Message) -> None:
        """Sends a message. Whether the other side is gone is found out by receiving."""
        with self._lock, contextlib.suppress(OSError):
            self._sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout_s: float = 10.0) -> list[Message]:
        """The messages that are complete once some bytes have come; maybe none.

        Raises:
            LineError: The connection ended, nothing came in time, or what came is no message.
        """
        return self._read(timeout_s, one=False)

    def _read(self, timeout_s: float, *, one: bool) -> list[Message]:
        """Reads what is there, or not beyond the first message."""
        try:
            self._sock.settimeout(max(timeout_s, 0.001))
            seen = self._sock.recv(2**16, socket.MSG_PEEK)
            data = self._sock.recv(seen.find(b"\n") + 1 or len(seen)) if one and seen else self._sock.recv(2**16)
            self._sock.settimeout(10.0)
        except OSError as error:
            raise LineError(f"the connection broke: {error}") from error
        if not data:
            raise LineError("the connection was closed")
        self.heard = time.monotonic()
        *whole, self._rest = (self._rest + data).split(b"\n")
        if max(map(len, (self._rest, *whole))) > self.longest:
            raise LineError("what came is no message")
        try:
            messages = [parse_json(text.decode("utf-8")) for text in whole]
        except ValueError as error:
            raise LineError("what came is no message") from error
        if not all(isinstance(message, dict) for message in messages):
            raise LineError("what came is no message")
        return messages

    def first(self) -> list[Message]:
        """The first message alone, if it has come; what comes after it is left for `receive`. Does not wait.

        Raises:
            LineError: See `receive`.
        """
        return self._read(0.0, one=True)

    def wait_for(self, timeout_s: float) -> Message:
        """The next message alone; what comes after it is left for `receive`.

        Raises:
            LineError: See `receive`; also when no whole message came in time.
        """
        end = time.monotonic() + timeout_s
        while (left := end - time.monotonic()) > 0:
            for message in self._read(left, one=True):
                return message
        raise LineError(f"nothing came within {timeout_s:g} s")

    @property
    def closed(self) -> bool:
        """Whether the other side has gone, as far as one can see without reading."""
        try:
            self._sock.setblocking(False)
            return not self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            with contextlib.suppress(OSError):
                self._sock.settimeout(10.0)

    def close(self) -> None:
        """Ends the connection; what was sent still arrives."""
        with contextlib.suppress(OSError):
            self._sock.close()


def is_message(message: Message, kinds: Kinds) -> bool:
    """Whether a message is of one of the kinds, with all of its fields, and no number in it is beyond bounds."""
    kind = message.get("kind")
    fields = kinds.get(kind) if isinstance(kind, str) else None
    return fields is not None and all(_fits(message.get(name), own) for name, own in fields.items())


def _fits(value: Any, kind: type) -> bool:
    return type(value) is kind and (kind is not int or 0 <= value < _MOST)
