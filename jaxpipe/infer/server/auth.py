"""The API key that a request must carry, if any."""

import hashlib
import hmac

from starlette.requests import HTTPConnection

from jaxpipe.infer.server.problem import Problem


class Auth:
    """Compares keys in a time that tells nothing about them.

    Args:
        keys: The keys that are good; none: every request is.
    """

    def __init__(self, keys: tuple[str, ...] = ()):
        self._digests = [_digest(key.encode()) for key in keys]

    def check(self, request: HTTPConnection):
        """Raises Problem 401 for a request without a good key in ``Authorization: Bearer …``."""
        if not self._digests:
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


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
