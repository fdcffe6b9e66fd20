"""Long-lived child processes that answer requests; a crash or a hang in one ends them all."""

import os
import socket
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any


class WorkerError(Exception):
    """A child process crashed, raised or did not answer in time."""


class Workers:
    """Child processes. Leave the context to kill them.

    Args:
        timeout_s: How long any answer may take.
    """

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._children: dict[str, _Child] = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for child in self._children.values():
            child.process.kill()
            child.process.wait()
            child.connection.close()
            child.log.close()

    def start(self, name: str, command: list[str], env: dict[str, str]) -> None:
        """Starts ``command... FD``; what it prints is kept for the error message.

        Args:
            name: What requests and errors call it.
            command: The program, which calls `serve` on its last argument.
            env: Variables besides ours.
        """
        here, there = socket.socketpair()
        log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        with there:
            process = subprocess.Popen(
                [*command, str(there.fileno())],
                pass_fds=[there.fileno()],
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._children[name] = _Child(process, Connection(here.detach()), log)

    def ask(self, names: list[str], request: str, **arguments) -> list[dict[str, Any]]:
        """Sends all `names` the request at once, and waits for all answers.

        Raises:
            WorkerError: Any child, asked or not, ended or raised, or an answer takes too long.
        """
        for name in names:
            self._send(name, request, arguments)
        answers: dict[str, Any] = {}
        end = time.monotonic() + self._timeout_s
        by_connection = {child.connection: name for name, child in self._children.items()}
        while missing := [name for name in names if name not in answers]:
            ready = wait(list(by_connection), max(0.0, end - time.monotonic()))
            if not ready:
                raise WorkerError(f"{', '.join(missing)}: no answer to {request!r} within {self._timeout_s:g} s")
            for connection in ready:
                name = by_connection[connection]  # pyright: ignore[reportArgumentType]
                answers[name] = self._receive(name)
        return [answers[name] for name in names]

    def _send(self, name: str, request: str, arguments: dict) -> None:
        try:
            self._children[name].connection.send((request, arguments))
        except OSError as error:
            raise self._crash(name) from error

    def _receive(self, name: str) -> Any:
        try:
            answer, trace = self._children[name].connection.recv()
        except (EOFError, OSError) as error:
            raise self._crash(name) from error
        if trace:
            raise WorkerError(f"{name} failed:\n{trace}")
        return answer

    def _crash(self, name: str) -> WorkerError:
        child = self._children[name]
        try:
            code = child.process.wait(5)
        except subprocess.TimeoutExpired:
            code = None
        child.log.seek(0)
        printed = child.log.read().decode(errors="replace").strip().splitlines()
        return WorkerError("\n".join([f"{name} ended with exit code {code}; it printed last:", *printed[-20:]]))


class _Child:
    def __init__(self, process: subprocess.Popen, connection: Connection, log):
        self.process, self.connection, self.log = process, connection, log


def serve(fd: int, answers: Callable[[], dict[str, Callable[..., Any]]]) -> None:
    """What a child does: answers requests until its parent is gone.

    Args:
        fd: The program's last argument.
        answers: Makes the functions that answer, by name of the request; what it raises goes to the parent too.
    """
    connection = Connection(fd)
    functions: dict[str, Callable[..., Any]] | None = None
    while True:
        try:
            request, arguments = connection.recv()
        except (EOFError, OSError):
            os._exit(0)  # exit hooks would wait for the other processes
        try:
            functions = functions or answers()
            reply = functions[request](**arguments), ""
        except Exception:
            reply = None, traceback.format_exc()
        connection.send(reply)
