"""How requests end: done, given up by their clients, too late, or with the server; and many of them at a time."""

import asyncio
import gc
import json
import random
import socket
import subprocess
import sys
import time

import openai
import pytest
from fake_engine import Bytes, FakeEngine
from serving import POST, events, serving, wait_for

from jaxpipe.serve import Limits


def say(client, prompt="x", **options):
    return client.completions.create(model="tiny", prompt=prompt, **{"temperature": 0, "max_tokens": 400} | options)


def test_full_queues_and_too_many_requests_get_429_with_a_time_to_come_back():
    engine = FakeEngine(slots=1, queue=2, tick_s=0.01)
    with (
        serving(engine, Bytes(), limits=Limits(requests=2)) as served,
        served.http() as http,
        served.client() as client,
    ):
        full = http.post("/v1/completions", json={"prompt": "x", "n": 8, "max_tokens": 400})
        assert (full.status_code, full.headers["retry-after"]) == (429, "1")
        assert full.json()["error"]["code"] == "queue_full"
        wait_for(lambda: engine.idle)
        streams = [say(client, stream=True), say(client, stream=True)]
        with pytest.raises(openai.RateLimitError, match="2 requests are in progress"):
            say(client)
        for stream in streams:
            stream.close()
        wait_for(lambda: engine.idle and len(served.service.desk) == 0)
        assert say(client, max_tokens=1).choices[0].text
    engine.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answers(stream):
    engine = FakeEngine(tick_s=0.01)
    with serving(engine, Bytes()) as served:
        host, port = served.url.removeprefix("http://").split(":")
        body = b'{"prompt": "x", "n": 3, "max_tokens": 400, "stream": %s}' % str(stream).lower().encode()
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(POST % len(body) + body)
            wait_for(lambda: engine.metrics()["slots_busy"] == 3)
        wait_for(lambda: engine.idle)
        assert engine.cancels == 3
        assert 'why="client_left"} 1' in served.service.page()
    engine.close()


def test_requests_that_take_too_long_get_504_or_an_error_in_the_stream():
    engine = FakeEngine(tick_s=0.05)
    limits = Limits(request_s=0.3, body_s=0.2)
    with serving(engine, Bytes(), limits=limits) as served, served.client() as client, served.http() as http:
        with pytest.raises(openai.InternalServerError, match=r"not done within 0\.3 s") as late:
            say(client)
        assert late.value.status_code == 504
        pieces = []
        with pytest.raises(openai.APIError, match=r"not done within 0\.3 s"):
            pieces.extend(say(client, stream=True))
        wait_for(lambda: engine.idle)

        def slow():
            yield b'{"prompt":'
            time.sleep(0.5)
            yield b'"x"}'

        answer = http.post("/v1/completions", content=slow(), headers={"Content-Type": "application/json"})
        assert (answer.status_code, "within 0.2 s" in answer.text) == (408, True)
    engine.close()


def test_a_dead_engine_is_told_to_all():
    engine = FakeEngine(tick_s=0.01)
    with serving(engine, Bytes()) as served, served.client() as client, served.http() as http:
        stream = say(client, stream=True)
        next(stream)
        engine.die()
        with pytest.raises(openai.APIError, match="the engine failed: device lost"):
            list(stream)
        health = http.get("/health")
        assert (health.status_code, health.json()["error"]["code"]) == (503, "engine_failed")
        with pytest.raises(openai.InternalServerError, match="the engine failed: device lost"):
            say(client)
        assert "jaxpipe_up 0" in http.get("/metrics").text
    engine.close()


def test_a_mistake_of_ours_is_a_500_and_the_next_request_is_answered(monkeypatch):
    engine = FakeEngine()
    with serving(engine, Bytes()) as served, served.client() as client, served.http() as http:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "submit", lambda request: 1 / 0)
            answer = http.post("/v1/completions", json={"prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "the server failed; its log says how")
        assert say(client, max_tokens=1).choices[0].text
        assert 'jaxpipe_http_answers_total{path="/v1/completions",status="500"} 1' in http.get("/metrics").text
    engine.close()


def test_a_stop_lets_requests_finish_and_admits_no_more():
    engine = FakeEngine(tick_s=0.01)
    with serving(engine, Bytes(), grace_s=20) as served, served.client() as client:
        stream = say(client, "abc", stream=True, max_tokens=60)
        text = next(stream).choices[0].text
        served.server.stop("the test")
        wait_for(lambda: served.service.desk.stopping)
        assert served.service.health() is not None
        with pytest.raises((openai.APIConnectionError, openai.InternalServerError)):  # refused, or told so
            say(client, max_tokens=1)
        assert text + "".join(chunk.choices[0].text for chunk in stream) == "abc" * 20
    assert served.service.desk.cut_off == 0
    engine.close()


SIGNALLED = """
import sys
from fake_engine import Bytes, FakeEngine
from jaxpipe.serve import Auth, Limits, Server, Service, listen_on
service = Service(FakeEngine(tick_s=0.01), Bytes(), "tiny", Limits(), ())
note = lambda text: print(text, flush=True)
sys.exit(Server(service, Auth(), listen_on("127.0.0.1", 0), grace_s=0.5, note=note).run())
"""


def test_sigterm_cuts_off_what_the_grace_does_not_suffice_for():
    process = subprocess.Popen([sys.executable, "-c", SIGNALLED], stdout=subprocess.PIPE, text=True, cwd="tests")
    assert process.stdout is not None
    url = process.stdout.readline().split()[-1]
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        stream = say(client, stream=True)
        next(stream)
        began = time.monotonic()
        process.terminate()
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)
        assert process.wait(20) == 1
    assert 0.4 < time.monotonic() - began < 10
    assert process.stdout.read().startswith("stopping   by SIGTERM: 1 requests may finish within 0.5 s")
    process.stdout.close()


STREAMS, TOKENS = 200, 40


async def one_of_many(url: str, number: int, chance: random.Random) -> str:
    """Streams one answer; a third of them are given up on the way. What came must be its own, in its order."""
    prompt = f"<{number:04}>"
    whole = (prompt * TOKENS)[:TOKENS]
    leave_at = chance.randrange(TOKENS // 2) if number % 3 == 0 else TOKENS
    body = {"prompt": prompt, "temperature": 0, "max_tokens": TOKENS, "stream": True}
    text, last = "", ""
    async for event in events(url, json.dumps(body).encode()):
        last = event
        if event != "[DONE]":
            text += json.loads(event)["choices"][0]["text"]
            assert whole.startswith(text)
        if len(text) > leave_at:
            return "left"
    assert (text, last) == (whole, "[DONE]")
    return "done"


async def many(url: str, chance: random.Random) -> list[str | BaseException]:
    tasks = [asyncio.create_task(one_of_many(url, number, chance)) for number in range(STREAMS)]
    for task in chance.sample(tasks, 10):
        asyncio.get_running_loop().call_later(chance.random(), task.cancel)
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_200_streams_at_a_time_of_which_many_leave_lose_and_mix_up_nothing():
    chance, blocks, page = random.Random(0), [], ""
    engine = FakeEngine(slots=STREAMS // 2, queue=STREAMS, tick_s=0.005)
    with serving(engine, Bytes()) as served:
        for _ in range(4):
            outcomes = asyncio.run(many(served.url, chance))
            wrong = [one for one in outcomes if isinstance(one, Exception)]
            assert wrong == []
            assert outcomes.count("done") >= STREAMS * 2 // 3 - 11
            wait_for(lambda: engine.idle and len(served.service.desk) == 0)
            outcomes.clear()
            gc.collect()
            blocks.append(sys.getallocatedblocks())
        page = served.service.page()
    assert engine.cancels > STREAMS // 3
    assert 'why="client_left"' in page
    assert abs(blocks[3] - blocks[1]) < 0.01 * blocks[1]
    engine.close()
