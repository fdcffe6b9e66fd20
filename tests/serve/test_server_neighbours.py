"""One client never harms another: whatever some of them do, the next one is answered at once."""

import json
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager

import pytest
from fake_engine import Bytes, FakeEngine
from serving import POST, serving, wait_for

from jaxpipe.errors import ConfigError
from jaxpipe.serve import Limits

JSON = {"Content-Type": "application/json"}
ONE = {"prompt": "x", "max_tokens": 1}
CHAT = "/v1/chat/completions"


class Odd(Bytes):
    """Hangs, panics or fails as the text says, until `over`."""

    def __init__(self):
        self.over = threading.Event()
        self.ended = []
        self.hanging = 0

    def encode(self, text):
        if text == "hang":
            self.hanging += 1
            self.over.wait(60)
        if text == "spin":
            try:
                while not self.over.is_set():
                    pass
            finally:
                self.ended.append(text)
        if text == "panic":
            raise type("PanicException", (BaseException,), {})("index out of bounds")
        if text == "fail":
            raise OverflowError("no\nfit")
        if text == "memory":
            raise MemoryError
        return super().encode(text)

    def chat(self, messages):
        return messages[-1]["content"]


@contextmanager
def odd(**limits):
    """A server whose tokenizer hangs where it is told to, and a client of it."""
    engine, tokenizer = FakeEngine(), Odd()
    with serving(engine, tokenizer, limits=Limits(**limits), grace_s=0.2) as served, served.http() as http:
        try:
            yield served, http
        finally:
            tokenizer.over.set()
    engine.close()


def raw(served, data=b""):
    host, port = served.url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=30)
    sock.sendall(data)
    return sock


def closed(sock):
    """Whether the server ends a connection without a word."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def answer(sock):
    """Status and JSON of an answer that ends the connection."""
    data = b"".join(iter(lambda: sock.recv(1 << 16), b""))
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def test_prompts_that_hang_get_504_and_hold_up_nobody():
    with odd(prompt_s=0.5) as (served, http):
        served.service.pool._patience_s = 0.05
        answers = []

        def hang(text):
            with served.http() as own:
                answers.append(own.post("/v1/completions", json=ONE | {"prompt": text}))

        threads = [threading.Thread(target=hang, args=(text,)) for text in ["hang"] * 9 + ["spin"] * 2]
        for thread in threads:
            thread.start()
        wait_for(lambda: served.service.pool._threads >= 5)
        assert http.post("/v1/completions", json=ONE).status_code == 200
        assert http.post(CHAT, json={"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}).is_success
        for thread in threads:
            thread.join()
        assert {(each.status_code, each.json()["error"]["code"]) for each in answers} == {(504, "prompt_timeout")}
        assert served.tokenizer.hanging
        wait_for(lambda: served.service.pool._threads == served.tokenizer.hanging)  # Python code is ended
        wait_for(lambda: len(served.service.desk) == 0)


def test_when_too_many_threads_hang_it_is_said():
    with odd(prompt_s=0.2) as (served, http):
        served.service.pool._most, served.service.pool._patience_s = 2, 0.01
        for _ in range(2):
            assert http.post("/v1/completions", json=ONE | {"prompt": "hang"}).status_code == 504
        full = http.post("/v1/completions", json=ONE)
        assert (full.status_code, full.json()["error"]["code"]) == (503, "busy")
        served.tokenizer.over.set()
        wait_for(lambda: served.service.pool._threads == 0)
        assert http.post("/v1/completions", json=ONE).status_code == 200


@pytest.mark.parametrize("text", ["panic", "fail", "memory"])
def test_a_tokenizer_that_fails_is_one_answer_in_json(text):
    with odd() as (served, http):
        failed = http.post("/v1/completions", json=ONE | {"prompt": text})
        error = failed.json()["error"]
        assert (failed.status_code, error["code"], "\n" in error["message"]) == (500, "tokenizer_failed", False)
        assert http.post("/v1/completions", json=ONE).status_code == 200
        assert served.service.health() is None


def test_a_client_that_leaves_and_a_server_that_stops_wait_for_no_prompt():
    with odd(prompt_s=60) as (served, _):
        body = json.dumps(ONE | {"prompt": "spin"}).encode()
        with raw(served, POST % len(body) + body):
            wait_for(lambda: served.service.pool._threads == 1)
        wait_for(lambda: served.service.pool._threads == 0 and len(served.service.desk) == 0)
        left = raw(served, POST % len(body) + body)
        wait_for(lambda: served.service.pool._threads == 1)
        served.server.stop("the test")
        assert answer(left)[0] == 503
        left.close()


HANGING = """
import sys, threading
from fake_engine import Bytes, FakeEngine
from jaxpipe.serve import Auth, Limits, Server, Service, listen_on
class Hanging(Bytes):
    def encode(self, text):
        print("hangs", flush=True)
        threading.Event().wait()  # as code that no exception reaches
service = Service(FakeEngine(), Hanging(), "tiny", Limits(), ())
note = lambda text: print(text, flush=True)
sys.exit(Server(service, Auth(), listen_on("127.0.0.1", 0), grace_s=0.2, note=note).run())
"""


def test_sigterm_ends_a_server_in_which_a_prompt_hangs():
    process = subprocess.Popen([sys.executable, "-c", HANGING], stdout=subprocess.PIPE, text=True, cwd="tests")
    assert process.stdout is not None
    host, port = process.stdout.readline().split()[-1].removeprefix("http://").removesuffix("/v1").split(":")
    body = json.dumps(ONE).encode()
    with socket.create_connection((host, int(port)), timeout=30) as sock:
        sock.sendall(POST % len(body) + body)
        assert process.stdout.readline() == "hangs\n"
        process.terminate()
        assert answer(sock)[0] == 503
        assert process.wait(20) == 1
    process.stdout.close()


def test_a_long_body_of_small_things_is_refused_beside_the_event_loop(monkeypatch):
    body = json.dumps({"messages": [{"role": "user", "content": ""}] * 100_000}).encode()
    tokens = json.dumps(ONE | {"prompt": [1] * 900_000}).encode()
    with odd() as (served, http):
        seen = []
        before = served.service.prompts._check_choices

        def look(*given):
            seen.append(threading.current_thread().name)
            before(*given)

        monkeypatch.setattr(served.service.prompts, "_check_choices", look)
        refused = http.post(CHAT, content=body, headers=JSON)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")
        assert "100000 entries and may have 4096" in refused.text
        assert http.post("/v1/completions", content=tokens, headers=JSON).status_code == 400
        assert seen == ["jaxpipe-prompt"]


def test_clients_that_are_slow_to_send_take_no_place_of_others():
    limits = {"requests": 4, "body_s": 30.0, "connections": 200}
    with odd(**limits) as (served, http), ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(raw(served, POST % 100 + b"{"))
        wait_for(lambda: served.service.metrics is not None and len(served.server._server.server_state.tasks) >= 60)
        assert len(served.service.desk) == 0
        assert http.post("/v1/completions", json=ONE).status_code == 200


def test_a_new_connection_takes_the_place_of_the_one_that_waits_longest():
    with odd(connections=8) as (served, _), ExitStack() as stack:
        old = [stack.enter_context(raw(served, data)) for data in (b"", b"GET ", POST % 9 + b"{") * 5]
        with served.http() as http:
            assert http.post("/v1/completions", json=ONE).status_code == 200
        assert all(map(closed, old[:8]))
        wait_for(lambda: len(served.server._server.server_state.connections) <= 8)


def test_while_all_connections_have_a_request_a_new_one_is_told_so():
    with odd(connections=1, prompt_s=60) as (served, _):
        body = json.dumps(ONE | {"prompt": "hang"}).encode()
        with raw(served, POST % len(body) + body):
            wait_for(lambda: served.service.pool._threads == 1)
            with raw(served) as refused:
                assert answer(refused)[0] == 503


def test_a_head_that_does_not_arrive_gets_408():
    with odd(head_s=0.1) as (served, http):
        for data in (b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET"):
            with raw(served, data) as sock:
                data = b"".join(iter(lambda sock=sock: sock.recv(1 << 16), b""))
                assert b"HTTP/1.1 408 Request Timeout\r\n" in data
        assert http.get("/health").status_code == 200


def test_a_client_that_does_not_read_is_dropped():
    engine = FakeEngine(max_len=1 << 16, slots=64, queue=1 << 12)
    limits = Limits(body_s=0.2, choices=512)
    with serving(engine, Bytes(), limits=limits) as served:
        body = json.dumps({"prompt": "x", "n": 512, "max_tokens": 200, "stream": True}).encode()
        served.server._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of connections to come
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            host, port = served.url.removeprefix("http://").split(":")
            sock.connect((host, int(port)))
            sock.sendall(POST % len(body) + body)
            wait_for(lambda: len(served.service.desk) == 1)
            wait_for(lambda: len(served.service.desk) == 0 and engine.idle)
        assert 'why="client_left"} 1' in served.service.page()
    engine.close()


def test_long_bodies_share_a_bounded_room_and_short_ones_need_none():
    with odd(body_bytes=100_000) as (served, http), ExitStack() as stack:
        for _ in range(16):
            stack.enter_context(raw(served, POST % 100_000 + b" " * 99_999))
        wait_for(lambda: served.service.room._free < 100_000)
        long = http.post("/v1/completions", content=b" " * 99_000, headers=JSON)
        assert (long.status_code, long.json()["error"]["code"]) == (503, "busy")
        assert http.post("/v1/completions", json=ONE).status_code == 200
    assert served.service.room._free == 16 * 100_000


FEW_FILES = """
import os, resource, sys
from fake_engine import Bytes, FakeEngine
from jaxpipe.serve import Auth, Limits, Server, Service, listen_on
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
service = Service(FakeEngine(), Bytes(), "tiny", Limits(), ())
note = lambda text: print(text, flush=True)
sys.exit(Server(service, Auth(), listen_on("127.0.0.1", 0), grace_s=0.5, note=note).run())
"""


def test_with_few_file_handles_the_newest_client_is_answered_and_nothing_is_logged():
    import httpx2

    process = subprocess.Popen(
        [sys.executable, "-c", FEW_FILES], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="tests"
    )
    assert process.stdout is not None
    url = next(line.split()[-1] for line in process.stdout if line.startswith("serving"))
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    with ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=30)).sendall(b"G")
        with httpx2.Client(base_url=url, timeout=60) as http:
            assert http.post("/completions", json=ONE).status_code == 200
        process.terminate()
        said = process.stdout.read()
        assert process.wait(20) == 0
    process.stdout.close()
    assert [line.split()[0] for line in said.splitlines()] == ["stopping"]


HOSTS = {
    "evil.example.com": 403,
    "evil.example.com:80": 403,
    "localhost.evil.com": 403,
    "127.0.0.1.evil.com": 403,
    "127.0.0.1": 200,
    "127.0.0.1:9": 200,
    "[::1]:9": 200,
    "LOCALHOST.": 200,
    "a.localhost:9": 200,
    "10.1.2.3": 200,
    socket.gethostname(): 200,
    "[": 403,
}


def test_without_a_key_only_names_of_the_server_are_answered():
    engine = FakeEngine()
    with serving(engine, Bytes()) as served, served.http() as http:
        for host, status in HOSTS.items():
            told = http.get("/v1/models", headers={"Host": host})
            assert (host, told.status_code) == (host, status)
            assert http.get("/health", headers={"Host": host}).status_code == 200
        assert told.json()["error"]["code"] == "host_not_allowed"
        assert "--allow-host" in told.json()["error"]["message"]
    with serving(engine, Bytes(), keys=("k",)) as served, served.http() as http:
        headers = {"Host": "any.example.com", "Authorization": "Bearer k"}
        assert http.get("/v1/models", headers=headers).status_code == 200
        odd = http.get("/nowhere", headers=headers | {"Host": "["})
        assert (odd.status_code, "'/nowhere' is not here" in odd.text) == (404, True)
    engine.close()


def test_the_name_of_an_unknown_option_is_in_param_as_it_is():
    with odd() as (_, http):
        names = {"temprature": "temprature", "it's": "it's", "\ud800": "\\ud800", "x" * 999: "x" * 60}
        for name, param in names.items():
            told = http.post("/v1/completions", content=json.dumps(ONE | {name: 1}).encode(), headers=JSON)
            assert (told.status_code, told.json()["error"]["param"]) == (400, param)
        told = http.post("/v1/completions", json=ONE | {"stream": True, "stream_options": {"usage": 1}})
        assert told.json()["error"]["param"] == "stream_options.usage"


def test_bytes_that_are_no_http_within_an_answer_end_it_and_nothing_else():
    engine = FakeEngine(tick_s=0.01)
    with serving(engine, Bytes()) as served, served.http() as http:
        body = b'{"prompt": "x", "max_tokens": 400, "stream": true}'
        with raw(served, POST % len(body) + body) as sock:
            assert sock.recv(100).startswith(b"HTTP/1.1 200")
            sock.sendall(b"\x00\x01\r\n\r\n" * 10)
        wait_for(lambda: engine.idle)
        assert http.post("/v1/completions", json=ONE).status_code == 200
    engine.close()


@pytest.mark.parametrize("wrong", [{"connections": 0}, {"head_s": 0}, {"prompt_s": float("inf")}])
def test_wrong_limits_are_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Limits(**wrong)
