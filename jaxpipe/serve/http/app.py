"""The server as an ASGI application: its paths and what answers them."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxpipe.serve.http.auth import Auth
from jaxpipe.serve.http.gate import Gate, failed, told
from jaxpipe.serve.http.reply import Generation
from jaxpipe.serve.requests import form, metrics
from jaxpipe.serve.requests.problem import Problem
from jaxpipe.serve.requests.schemas import read_chat, read_completion
from jaxpipe.serve.requests.service import Service


def make_app(service: Service, auth: Auth) -> Starlette:
    """Makes the application.

    Args:
        service: What answers.
        auth: Who may ask.
    """
    text = Generation(service, form.TEXT, read_completion, service.prompts.encode)
    chat = Generation(service, form.CHAT, read_chat, service.prompts.chat)

    async def health(request: Request) -> Response:
        problem = service.health()
        return JSONResponse({"status": "ok"}) if problem is None else await told(request, problem)

    async def page(request: Request) -> Response:
        return Response(service.page(), headers={"Content-Type": metrics.CONTENT_TYPE})

    model = {"id": service.model, "object": "model", "created": service.created, "owned_by": "jaxpipe"}

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        service.check_model(request.path_params["name"])
        return JSONResponse(model)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/metrics", page),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", one_model),
            Route("/v1/completions", text.endpoint, methods=["POST"]),
            Route("/v1/chat/completions", chat.endpoint, methods=["POST"]),
        ],
        middleware=[Middleware(Gate, auth=auth, metrics=service.metrics)],
        exception_handlers={Problem: told, HTTPException: told, Exception: failed},
    )
