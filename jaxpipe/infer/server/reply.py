"""The reply to a request for text: whole, or as a stream of events while it is made."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxpipe.infer.server import sse
from jaxpipe.infer.server.body import read_json
from jaxpipe.infer.server.form import Answer, Choice, Form
from jaxpipe.infer.server.mailbox import Mailbox
from jaxpipe.infer.server.problem import Problem
from jaxpipe.infer.server.schemas import Ask
from jaxpipe.infer.server.service import Service
from jaxpipe.infer.server.work import Work

STALLED_S = 10.0
"""How long beyond its time a request may hang in a client that does not read."""


class Generation:
    """One of the two endpoints that generate.

    Args:
        service: Does it.
        form: Of its answers.
        read: ``body -> (prompts, ask)``.
        encode: ``(prompts, ask) -> tokens of each``; takes time.
    """

    def __init__(
        self,
        service: Service,
        form: Form,
        read: Callable[[dict[str, Any]], tuple[Any, Ask]],
        encode: Callable[[Any, Ask], list[list[int]]],
    ):
        self._service = service
        self._form = form
        self._read = read
        self._encode = encode

    async def endpoint(self, request: Request) -> ASGIApp:
        """The reply, which does its work while it is sent."""

        async def reply(scope: Scope, receive: Receive, send: Send):
            with self._service.desk.admit() as mailbox:
                await self._counted(request, mailbox, send)

        return reply

    async def _counted(self, request: Request, mailbox: Mailbox, send: Send):
        why = "failed"
        try:
            async with asyncio.timeout(self._service.limits.request_s + STALLED_S):
                why = await self._answer(request, mailbox, send)
        except ClientDisconnect:
            why = "client_left"
        except TimeoutError:
            why = "client_stalled"
        except Problem as problem:
            why = problem.code or "refused"
            raise
        finally:
            self._service.metrics.ended.add(1, why)

    async def _answer(self, request: Request, mailbox: Mailbox, send: Send) -> str:
        """Answers a request; returns how that ended."""
        service = self._service
        prompts, ask = self._read(await read_json(request, service.limits))
        service.check_model(ask.model)
        tokens = await asyncio.to_thread(self._encode, prompts, ask)
        if refusal := service.health():
            raise refusal
        work = Work(service.engine, service.prompts, service.metrics, mailbox, ask, tokens, service.stop_ids)
        async with _departure(request, mailbox):
            try:
                work.start()
                answer = Answer(self._form, service.model)
                if ask.stream:
                    return await _stream(answer, work, send)
                response = JSONResponse(await _whole(answer, work))
                await response(request.scope, request.receive, send)
                return "done"
            finally:
                work.close()


async def _whole(answer: Answer, work: Work) -> dict[str, Any]:
    choices = [Choice(text=text) for text in work.echoes()]
    async for change in work.changes():
        for index, new in change.items():
            choices[index].extend(new)
    return answer.whole(choices, work.usage())


async def _stream(answer: Answer, work: Work, send: Send) -> str:
    """After the head, problems can only be told in the stream: in the place of the rest of it, [DONE] included."""
    headers = {"Content-Type": f"{sse.MEDIA_TYPE}; charset=utf-8", **sse.HEADERS}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw})
    try:
        async for part in _events(answer, work):
            await send({"type": "http.response.body", "body": part, "more_body": True})
    except Problem as problem:
        await send({"type": "http.response.body", "body": sse.event(problem.body())})
        return problem.code or "failed"
    await send({"type": "http.response.body", "body": sse.DONE})
    return "done"


async def _events(answer: Answer, work: Work) -> AsyncIterator[bytes]:
    form, echoes = answer.form, work.echoes()
    if form.opening is not None:
        yield b"".join(sse.event(answer.chunk([form.opening(index)])) for index in range(len(echoes)))
    elif any(echoes):
        yield b"".join(sse.event(answer.chunk([form.delta(i, Choice(text))])) for i, text in enumerate(echoes))
    async for change in work.changes():
        said = {index: new for index, new in change.items() if new.text or new.tokens or new.finish_reason}
        if said:
            yield b"".join(sse.event(answer.chunk([form.delta(index, new)])) for index, new in said.items())
    if work.ask.include_usage:
        yield sse.event(answer.chunk([], work.usage()))


@asynccontextmanager
async def _departure(request: Request, mailbox: Mailbox) -> AsyncIterator[None]:
    """While entered, a client that leaves ends its request."""

    async def watch():
        while (await request.receive())["type"] != "http.disconnect":
            pass
        mailbox.fail(ClientDisconnect())

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
