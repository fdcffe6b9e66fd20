"""The server's life: it listens, serves, and on a signal finishes what runs and refuses what comes."""

import asyncio
import logging
import math
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.logging import AccessFormatter

from jaxpipe.errors import ConfigError
from jaxpipe.serve.http.app import make_app
from jaxpipe.serve.http.auth import Auth
from jaxpipe.serve.http.connections import AT_ONCE, connection_class
from jaxpipe.serve.requests.service import Service

KEEP_ALIVE_S = 75
"""How long an idle connection stays open: longer than proxies keep theirs, or they would send into closed ones."""
BACKLOG = 2048
"""Connections that wait in the system to be taken on."""
SPARE_S = 5
"""How long connections may take to close after the last request was ended."""


def listen_on(host: str, port: int) -> socket.socket:
    """Binds the address; connections are refused until `serve` is called.

    Args:
        host: Name or number.
        port: 0 takes a free one.

    Raises:
        ConfigError: It cannot be bound.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host!r} is no address of this machine: {error.strerror}; try 127.0.0.1") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise ConfigError(f"--port {port} of {host} cannot be listened on: {error.strerror}; try --port 0") from error
    return sock


def url_of(sock: socket.socket) -> str:
    """Where a bound socket is reached."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server:
    """Serves until it is stopped, by `stop` or, in the main thread, by SIGINT or SIGTERM.

    The first stop ends new requests: the socket is closed, and requests on open connections get 503. Those in progress
    may finish within `grace_s`; a second stop, or the end of that time, ends them with an error.

    Args:
        service: What answers.
        auth: Who may ask.
        sock: From `listen_on`.
        grace_s: See above.
        log_requests: Whether to write a line for each request.
        note: Is told what happens.
    """

    def __init__(
        self,
        service: Service,
        auth: Auth,
        sock: socket.socket,
        *,
        grace_s: float = 30.0,
        log_requests: bool = False,
        note: Callable[[str], None] = lambda _: None,
    ):
        config = uvicorn.Config(
            make_app(service, auth),
            http=connection_class(service.limits),
            backlog=AT_ONCE,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,  # uvicorn's own would close the handlers of everybody else in the process
            log_level="warning",
            access_log=log_requests,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(grace_s) + SPARE_S,
        )
        if log_requests:  # after uvicorn has set its loggers' levels
            _log_requests()
        self._server = _Uvicorn(config, lambda: note(f"serving    {service.model} at {url_of(sock)}/v1"))
        self._desk = service.desk
        self._sock = sock
        self._grace_s = grace_s
        self._note = note
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self) -> int:
        """Serves; returns how many requests were cut off."""
        asyncio.run(self._run())
        return self._desk.cut_off

    def stop(self, why: str):
        """Stops it, from any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop, why)

    async def _run(self):
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(_Once(self._note))
        with _signals(self._loop, self._stop):
            await self._server.serve(sockets=[self._sock])

    def _stop(self, why: str):
        desk = self._desk
        if desk.stopping:
            self._note(f"stopping   by {why} again: {len(desk)} requests are cut off")
            desk.cut()
            return
        desk.stopping = self._server.should_exit = True
        self._note(f"stopping   by {why}: {len(desk)} requests may finish within {self._grace_s:g} s")
        asyncio.get_running_loop().call_later(self._grace_s, desk.cut)


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]):
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None):
        await super().startup(sockets)
        for sock in sockets or ():
            sock.listen(BACKLOG)
        self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are `_signals`' own: uvicorn would raise them again once it is done, and knows no grace."""
        yield


class _Once:
    """Notes what goes wrong between connections and the event loop, each kind once a minute: strangers can cause it.

    Args:
        note: Is told.
    """

    def __init__(self, note: Callable[[str], None]):
        self._note, self._last_s = note, {}

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]):
        what, error = str(context.get("message", "")), context.get("exception")
        if loop.time() - self._last_s.get(what, -math.inf) >= 60:
            self._last_s[what] = loop.time()
            self._note(f"warning    {what}: {error!r}; the same is told again after a minute at the earliest")


def _log_requests() -> None:
    """Has a line for each request written to standard output."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(AccessFormatter('%(client_addr)s - "%(request_line)s" %(status_code)s'))
    logger = logging.getLogger("uvicorn.access")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


@contextmanager
def _signals(loop: asyncio.AbstractEventLoop, stop: Callable[[str], None]) -> Iterator[None]:
    here = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if here else ()
    for number in numbers:
        loop.add_signal_handler(number, stop, number.name)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
