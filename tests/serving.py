"""A server in a thread of the test's process, on a free port."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import openai

from jaxpipe.serve import Auth, Limits, Server, Service, listen_on, url_of

POST = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)


@dataclass
class Served:
    """A server that runs."""

    url: str
    service: Service
    server: Server
    tokenizer: Any = None

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        """OpenAI's client, which does not try again by itself."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def http(self) -> httpx2.Client:
        """A plain client."""
        return httpx2.Client(base_url=self.url, timeout=60)


@contextmanager
def serving(
    engine: Any,
    tokenizer: Any,
    *,
    keys: tuple[str, ...] = (),
    limits: Limits | None = None,
    source_len: int = 0,
    **options: Any,
):
    """Serves while entered.

    Args:
        engine: Generates.
        tokenizer: Its own.
        keys: API keys.
        limits: By default the server's own.
        source_len: Of the generator, for an encoder-decoder.
        options: Of `Server`.
    """
    stop_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    service = Service(engine, tokenizer, "tiny", limits or Limits(), stop_ids, source_len)
    sock = listen_on("127.0.0.1", 0)
    ready = threading.Event()
    server = Server(service, Auth(keys), sock, note=lambda text: ready.set(), **options)
    served = Served(url_of(sock), service, server, tokenizer)
    thread = threading.Thread(target=server.run)
    thread.start()
    assert ready.wait(30)
    try:
        yield served
    finally:
        served.server.stop("the test")
        thread.join()


async def events(url: str, body: bytes) -> AsyncIterator[str]:
    """The data of an answer's events, by a client that costs next to nothing."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(POST % len(body) + body)
        async for line in reader:
            if line.startswith(b"data: "):
                yield line.removeprefix(b"data: ").decode().strip()
            if line.startswith(b"data: [DONE]"):
                return
    finally:
        writer.close()


def wait_for(condition, seconds: float = 20.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.01)
