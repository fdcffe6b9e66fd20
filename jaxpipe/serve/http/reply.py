"""The reply to a request for text: whole, or as a stream of events while it is made."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxpipe.serve.http import sse
from jaxpipe.serve.http.body import parse, read_body
from jaxpipe.serve.requests.form import Answer, Choice, Form
from jaxpipe.serve.requests.mailbox import Mailbox
from jaxpipe.serve.requests.problem import Problem
from jaxpipe.serve.requests.schemas import Ask
from jaxpipe.serve.requests.service import Service
from jaxpipe.serve.requests.work import Work

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
            if refusal := self._service.desk.refusal():
                raise refusal
            await self._counted(request, send)

        return reply

    async def _counted(self, request: Request, send: Send):
        service, why = self._service, "failed"
        try:
            # The body first: clients that are slow to send theirs take no place from those that have.
            body = await read_body(request, service.limits, service.room)
            with service.desk.admit() as mailbox:
                async with asyncio.timeout(service.limits.request_s + STALLED_S):
                    why = await self._answer(request, body, mailbox, send)
        except ClientDisconnect:
            why = "client_left"
        except TimeoutError:
            why = "client_stalled"
        except Problem as problem:
            why = problem.code or "refused"
            raise
        finally:
            self._service.metrics.ended.add(1, why)

    async def _answer(self, request: Request, body: bytes, mailbox: Mailbox, send: Send) -> str:
        """Answers a request; returns how that ended."""
        service = self._service
        async with _departure(request, mailbox):
            reading = service.pool.run(partial(self._prepare, body), service.limits.prompt_s)
            ask, tokens, echoes = await mailbox.meanwhile(reading)
            if refusal := service.health():
                raise refusal
            work = Work(
                service.engine, service.prompts, service.metrics, mailbox, ask, tokens, echoes, service.stop_ids
            )
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

    def _prepare(self, body: bytes) -> tuple[Ask, list[list[int]], list[str]]:
        """What a body asks for, its tokens, and what each answer begins with: all that takes time."""
        prompts, ask = self._read(parse(body))
        self._service.check_model(ask.model)
        tokens = self._encode(prompts, ask)
        texts = [self._service.prompts.decode(prompt) if ask.echo else "" for prompt in tokens]
        return ask, tokens, [text for text in texts for _ in range(ask.n)]


async def _whole(answer: Answer, work: Work) -> dict[str, Any]:
    choices = [Choice(text=text) for text in work.echoes]
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
    form, echoes = answer.form, work.echoes
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
