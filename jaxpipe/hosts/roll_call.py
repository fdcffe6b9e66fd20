"""Who is there: every process tells process 0 its number, and process 0 waits for all of them.

It happens on the coordinator's port before JAX's own service takes that over: that service cannot say who is missing,
and aborts the process when its time is up. The connections stay; they are how the processes talk from then on.

Anybody who reaches the port may connect. Process 0 says a number that it has never said before, and listens only to who
answers with the digest of that number, the run's token and its own facts; all else is sent away, and no stranger holds
up the others.
"""

import contextlib
import hashlib
import hmac
import secrets
import selectors
import socket
import time
from typing import Any

from jaxpipe.errors import ConfigError
from jaxpipe.hosts.line import LONGEST, Kinds, Line, LineError, Message, is_message
from jaxpipe.hosts.place import TOKEN, Place

_GREETING = "jaxpipe"
_HELLO: Kinds = {_GREETING: {"number": int, "count": int, "host": str, "proof": str}}
_CHALLENGE: Kinds = {"challenge": {"nonce": str}}
_HELLO_BYTES, _HELLO_S = 2**12, 5.0
"""The longest first message, and how long it may take to come."""
_PENDING = 256
"""Connections at a time of which process 0 does not know who they are; beyond, the oldest is closed."""


def gather(place: Place, timeout_s: float) -> tuple[dict[int, Line], dict[int, str]]:
    """Process 0: waits until all others have said who they are.

    Returns:
        Lines to the others by number, and the hosts of all by number.

    Raises:
        ConfigError: The port is not to be had, or two processes do not fit together; all are told.
        LineError: Some did not come in time; those that came are told the same.
    """
    lines: dict[int, Line] = {}
    hosts = {0: socket.gethostname()}
    end = time.monotonic() + timeout_s
    with _listen(place) as listener, _Strangers(listener) as strangers:
        while len(hosts) < place.count:
            left = end - time.monotonic()
            if left <= 0:
                missing = [number for number in range(place.count) if number not in hosts]
                _fail(
                    lines,
                    f"process{'es' if len(missing) > 1 else ''} {_numbers(missing)} of {place.count} did not arrive "
                    f"at {place.address} within {timeout_s:g} s; look at their output, or try a longer "
                    "--start-timeout",
                )
            for line, nonce, hello in strangers.heard(left):
                _meet(place, line, nonce, hello, lines, hosts)
    for line in lines.values():
        line.send({"kind": "welcome", "hosts": [hosts[number] for number in range(place.count)]})
    return lines, hosts


def answer(place: Place, timeout_s: float) -> tuple[dict[int, Line], dict[int, str]]:
    """Every other process: says who it is and waits until all have.

    Returns:
        The line to process 0 by its number, and the hosts of all by number.

    Raises:
        ConfigError: Process 0 says that two processes do not fit together.
        LineError: Process 0 cannot be reached in time, or says that others did not come.
    """
    line = _connect(place, timeout_s)
    try:
        reply = line.wait_for(timeout_s)
        if is_message(reply, _CHALLENGE):
            facts: Message = {"number": place.number, "count": place.count, "host": socket.gethostname()}
            line.send({"kind": _GREETING, **facts, "proof": _proof(place.token, reply["nonce"], facts)})
            reply = line.wait_for(timeout_s + 10.0)  # process 0 gives up first, and says why
    except LineError as error:
        line.close()
        raise LineError(f"process 0 at {place.address} was lost while the processes came together: {error}") from error
    hosts = reply.get("hosts")
    if reply.get("kind") != "welcome" or not isinstance(hosts, list) or len(hosts) != place.count:
        line.close()
        kind = ConfigError if reply.get("misfit") else LineError
        raise kind(str(reply.get("text", f"{place.address} is not process 0 of a run of jaxpipe")))
    return {0: line}, {number: str(host) for number, host in enumerate(hosts)}


def _proof(token: str, nonce: str, facts: Message) -> str:
    """What only those can compute who have the token."""
    said = "|".join([nonce, *(str(facts[name]) for name in ("number", "count", "host"))])
    return hmac.new(token.encode(), said.encode(), hashlib.sha256).hexdigest()


class _Strangers:
    """Connections of which it is not known yet whose they are.

    Args:
        listener: A socket that listens.
    """

    def __init__(self, listener: socket.socket):
        listener.setblocking(False)
        self._listener, self._selector = listener, selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._pending: dict[Line, tuple[str, float]] = {}  # what they were asked, and until when they may answer

    def __enter__(self) -> "_Strangers":
        return self

    def __exit__(self, *_: Any) -> None:
        for line in list(self._pending):
            self._drop(line)
        self._selector.close()

    def heard(self, timeout_s: float) -> list[tuple[Line, str, Message]]:
        """Those that have sent a hello, with what they had been asked. Waits for something to happen, if only a while.

        Args:
            timeout_s: How long at most.
        """
        heard = []
        for key, _ in self._selector.select(min(timeout_s, 1.0)):
            if key.fileobj is self._listener:
                self._accept()
            elif (line := key.data) in self._pending:
                nonce, _ = self._pending[line]
                try:
                    hellos = line.first()
                except LineError:
                    self._drop(line)
                    continue
                for hello in hellos:
                    if is_message(hello, _HELLO):
                        self._selector.unregister(line)
                        del self._pending[line]
                        heard.append((line, nonce, hello))
                    else:
                        self._drop(line)
        for line in [line for line, (_, until) in self._pending.items() if until < time.monotonic()]:
            self._drop(line)
        return heard

    def _accept(self) -> None:
        try:
            line = Line(self._listener.accept()[0], _HELLO_BYTES)
        except OSError:  # gone again, or no file handle is left for now
            time.sleep(0.01)
            return
        nonce = secrets.token_hex(16)
        line.send({"kind": "challenge", "nonce": nonce})
        self._pending[line] = nonce, time.monotonic() + _HELLO_S
        self._selector.register(line, selectors.EVENT_READ, line)
        if len(self._pending) > _PENDING:
            self._drop(next(iter(self._pending)))

    def _drop(self, line: Line) -> None:
        self._selector.unregister(line)
        del self._pending[line]
        line.close()


def _meet(place: Place, line: Line, nonce: str, hello: Message, lines: dict[int, Line], hosts: dict[int, str]) -> None:
    """Takes a process in.

    Raises:
        ConfigError: It does not fit.
    """
    number, count, host = hello["number"], hello["count"], hello["host"][:255]
    if not hmac.compare_digest(hello["proof"].encode(), _proof(place.token, nonce, hello).encode()):
        line.send({"kind": "end", "text": f"{TOKEN} must be the same in all processes; it is not", "misfit": True})
        line.close()
        return
    if not 0 < number < count:  # none of ours: these are checked before they come
        line.close()
        return
    text = _misfit(place, number, count, host, lines, hosts)
    if text:
        _fail({**lines, -1: line}, text, misfit=True)
    if number in lines:
        lines[number].close()
    line.longest = LONGEST
    lines[number], hosts[number] = line, host


def _listen(place: Place) -> socket.socket:
    dual, host = socket.has_dualstack_ipv6(), place.interface()
    try:
        return socket.create_server(
            (host, place.port),
            family=socket.AF_INET6 if ":" in host or (dual and not host) else socket.AF_INET,
            dualstack_ipv6=dual and not host,
            backlog=min(max(place.count, 64), 4096),
        )
    except OSError as error:
        raise ConfigError(
            f"--coordinator {place.address}: process 0 cannot listen on port {place.port} of {socket.gethostname()} "
            f"({error.strerror}); try port {place.port % 65535 + 1}"
        ) from error


def _misfit(
    place: Place, number: int, count: int, host: str, lines: dict[int, Line], hosts: dict[int, str]
) -> str | None:
    """What is wrong with a newcomer. One that started again takes the place of the one before."""
    if count != place.count:
        return (
            f"process {number} ({host}) was started with --num-processes {count} and process 0 ({hosts[0]}) with "
            f"{place.count}; try {place.count} for all"
        )
    if number in lines and not lines[number].closed:
        return f"two processes have --process-id {number}, on {hosts[number]} and {host}; try a number for each"
    return None


def _connect(place: Place, timeout_s: float) -> Line:
    end = time.monotonic() + timeout_s
    error: OSError | None = None
    while (left := end - time.monotonic()) > 0:
        try:
            return Line(socket.create_connection((place.host, place.port), timeout=min(left, 10.0)))
        except OSError as caught:  # not there yet, or its name is not known yet
            error = caught
            time.sleep(min(0.2, max(0.0, end - time.monotonic())))
    raise LineError(
        f"process {place.number} could not reach process 0 at {place.address} within {timeout_s:g} s "
        f"({(error and error.strerror) or error}); look at its output, at the address and at firewalls"
    ) from error


def _fail(lines: dict[int, Line], text: str, *, misfit: bool = False) -> None:
    for line in lines.values():
        line.send({"kind": "end", "text": text, "misfit": misfit})
    for line in lines.values():
        with contextlib.suppress(LineError):
            line.receive(1.0)  # its end, so that it has read ours
        line.close()
    raise (ConfigError if misfit else LineError)(text)


def _numbers(numbers: list[int], most: int = 20) -> str:
    """Numbers for people.

    Example:
        >>> _numbers([1, 2, 5, 7], most=3)
        '1, 2, 5 and 1 more'
    """
    shown = ", ".join(map(str, numbers[:most]))
    return shown if len(numbers) <= most else f"{shown} and {len(numbers) - most} more"
