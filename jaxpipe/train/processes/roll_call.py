"""Who is there: every process tells process 0 its number, and process 0 waits for all of them.

It happens on the coordinator's port before JAX's own service takes that over: that service cannot say who is missing,
and aborts the process when its time is up. The connections stay; they are how the processes talk from then on.
"""

import contextlib
import socket
import time

from jaxpipe.errors import ConfigError
from jaxpipe.train.processes.line import Line, LineError
from jaxpipe.train.processes.place import Place

_GREETING = "jaxpipe"


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
    with _listen(place) as listener:
        try:
            while len(hosts) < place.count:
                _accept(listener, end, place, lines, hosts)
        except TimeoutError:
            missing = [number for number in range(place.count) if number not in hosts]
            _fail(
                lines,
                f"process{'es' if len(missing) > 1 else ''} {_numbers(missing)} of {place.count} did not arrive at "
                f"{place.address} within {timeout_s:g} s; look at their output, or try a longer --start-timeout",
            )
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
    hello = {"kind": _GREETING, "number": place.number, "count": place.count, "host": socket.gethostname()}
    line.send(hello)
    try:
        reply = line.wait_for(timeout_s + 10.0)  # process 0 gives up first, and says why
    except LineError as error:
        line.close()
        raise LineError(f"process 0 at {place.address} was lost while the processes came together: {error}") from error
    if reply.get("kind") != "welcome":
        line.close()
        kind = ConfigError if reply.get("misfit") else LineError
        raise kind(str(reply.get("text", f"{place.address} is not process 0 of a run of jaxpipe")))
    return {0: line}, dict(enumerate(reply["hosts"]))


def _listen(place: Place) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", place.port),
            family=socket.AF_INET6 if dual else socket.AF_INET,
            dualstack_ipv6=dual,
            backlog=min(place.count, 4096),
        )
    except OSError as error:
        raise ConfigError(
            f"--coordinator {place.address}: process 0 cannot listen on port {place.port} of {socket.gethostname()} "
            f"({error.strerror}); try port {place.port % 65535 + 1}"
        ) from error


def _accept(listener: socket.socket, end: float, place: Place, lines: dict[int, Line], hosts: dict[int, str]) -> None:
    """Takes one connection; strangers are sent away.

    Raises:
        TimeoutError: The time is up.
        ConfigError: The newcomer does not fit.
    """
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    listener.settimeout(left)
    line = Line(listener.accept()[0])
    try:
        hello = line.wait_for(min(5.0, max(end - time.monotonic(), 0.1)))
        number, count, host = int(hello["number"]), int(hello["count"]), str(hello["host"])
        if hello["kind"] != _GREETING:
            raise ValueError(hello)
    except (LineError, KeyError, TypeError, ValueError):
        line.close()
        return
    text = _misfit(place, number, count, host, lines, hosts)
    if text:
        _fail({**lines, -1: line}, text, misfit=True)
    if number in lines:
        lines[number].close()
    lines[number], hosts[number] = line, host


def _misfit(
    place: Place, number: int, count: int, host: str, lines: dict[int, Line], hosts: dict[int, str]
) -> str | None:
    """What is wrong with a newcomer. One that started again takes the place of the one before."""
    if count != place.count:
        return (
            f"process {number} ({host}) was started with --num-processes {count} and process 0 ({hosts[0]}) with "
            f"{place.count}; try {place.count} for all"
        )
    if number == 0 or (number in lines and not lines[number].closed):
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
