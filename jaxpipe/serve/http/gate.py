"""What stands before every path: the API key, the count of answers, and problems as JSON."""

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxpipe.documents import shown
from jaxpipe.serve.http.auth import Auth
from jaxpipe.serve.http.body import drain
from jaxpipe.serve.requests.metrics import Metrics
from jaxpipe.serve.requests.problem import Problem

OPEN = ("/health",)
"""Paths that need no key."""
PATHS = ("/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")


class Gate:
    """Checks keys and counts answers.

    Args:
        app: What comes behind it.
        auth: Who may pass.
        metrics: Counts.
    """

    def __init__(self, app: ASGIApp, auth: Auth, metrics: Metrics):
        self._app = app
        self._auth = auth
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in PATHS else "other"

        async def count(message: Message):
            if message["type"] == "http.response.start":
                self._metrics.answers.add(1, path, str(message["status"]))
            await send(message)

        request = Request(scope, receive)
        try:
            if path not in OPEN:
                self._auth.check(request)
        except Problem as problem:
            response = await told(request, problem)
            await response(scope, receive, count)
            return
        try:
            await self._app(scope, receive, count)
        except Exception:
            self._metrics.answers.add(1, path, "500")
            raise


async def told(request: Request, problem: Exception) -> Response:
    """The answer that says what is wrong."""
    if isinstance(problem, HTTPException):
        where = f"{request.method} {shown(request.scope['path'])}"
        hints = {404: f"{where} is not here; try one of {', '.join(PATHS)}", 405: f"{where}: the method is not allowed"}
        headers = dict(problem.headers or {})
        problem = Problem(problem.status_code, hints.get(problem.status_code, problem.detail))
        problem.headers |= headers
    assert isinstance(problem, Problem)
    await drain(request)
    return _json(problem)


async def failed(request: Request, error: Exception) -> Response:
    """The answer to a request that met a mistake of ours; uvicorn logs it."""
    return _json(Problem(500, "the server failed; its log says how"))


def _json(problem: Problem) -> Response:
    return JSONResponse(problem.body(), status_code=problem.status, headers=problem.headers)
