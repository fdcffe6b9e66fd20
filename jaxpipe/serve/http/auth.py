"""Who may ask: the API key that a request must carry; where there is none, the name it must call the server by."""

import hashlib
import hmac
import ipaddress
import re
import socket
from collections.abc import Iterable

from starlette.requests import HTTPConnection

from jaxpipe.documents import shown
from jaxpipe.serve.requests.problem import Problem


class Auth:
    """Compares keys in a time that tells nothing about them.

    Args:
        keys: The keys that are good; none: every request is whose ``Host`` is an IP address, ``localhost``, this
            machine's name, or one of `hosts`. So no web page can reach the server by a name of its own that it has
            resolve to the server's address (DNS rebinding).
        hosts: Other names of the server.
    """

    def __init__(self, keys: tuple[str, ...] = (), hosts: Iterable[str] = ()):
        self._digests = [_digest(key.encode()) for key in keys]
        self._hosts = {_plain(name) for name in ("localhost", socket.gethostname(), *hosts)}

    def check(self, request: HTTPConnection):
        """Checks who asks.

        Raises:
            Problem: 401 without a good key in ``Authorization: Bearer …``; 403 for a host that is not this server.
        """
        if not self._digests:
            self._check_host(request.headers.get("host"))
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = _digest(key.strip().encode("latin-1"))
        good = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(good):
            problem = Problem(
                401, "a good API key is needed; send it as 'Authorization: Bearer KEY'", code="invalid_api_key"
            )
            problem.headers["WWW-Authenticate"] = "Bearer"
            raise problem

    def _check_host(self, host: str | None):
        name = None if host is None else _plain(re.sub(r":\d*$", "", host))
        if name is None or name in self._hosts or name.endswith(".localhost") or _is_address(name):
            return
        raise Problem(
            403,
            f"Host {shown(host)} is no name of this server; ask for it by its address, start it with "
            "--allow-host NAME, or with a key",
            code="host_not_allowed",
        )


def _plain(name: str) -> str:
    return name.strip().rstrip(".").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
