"""What the server refuses: each wrong request gets a 4xx that says in one line what is wrong, and nothing worse."""

import json
import socket

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from jaxpipe.errors import ConfigError
from jaxpipe.serve import Limits, listen_on
from jaxpipe.serve.requests.schemas import CHAT, COMPLETION

JSON = {"Content-Type": "application/json"}


WRONG = {
    "unknown": ({"temprature": 1}, "unknown option 'temprature'; did you mean temperature?"),
    "range": ({"temperature": 2.5}, "temperature=2.5 must be a number of at least 0 and at most 2"),
    "bool": ({"max_tokens": True}, "max_tokens=True must be a whole number"),
    "unsupported": ({"logit_bias": {"5": 1}}, "logit_bias={'5': 1} is not supported; leave it out"),
    "penalty": ({"presence_penalty": 0.5}, "presence_penalty=0.5 is not supported; only presence_penalty=0 is"),
    "logprobs": ({"logprobs": 3}, "try logprobs=0"),
    "best of": ({"best_of": 3}, "only best_of=n=1 is"),
    "stops": ({"stop": [""]}, "stop='' must have 1 to 256 characters"),
    "usage": ({"stream_options": {"include_usage": True}}, "no effect without stream=true"),
    "choices": ({"n": 9}, "n=9 times 1 prompt must be at most 8 answers"),
    "long": ({"prompt": "x" * 101}, "prompt has 101 tokens and must have at most 100"),
    "too many tokens": ({"max_tokens": 121}, "max_tokens=121 must be at most 120: the server's"),
    "no room": ({"prompt": "x" * 100, "max_tokens": 200}, "max_tokens=200 must be at most 120"),
    "empty": ({"prompt": ""}, "prompt holds no tokens"),
    "no prompt": ({"prompt": None}, "prompt is missing"),
    "mixed": ({"prompt": ["a", 1]}, "prompt[1]=1 must be a string"),
    "id": ({"prompt": [1, 257]}, "prompt[1]=257 must be a token id below 257"),
    "surrogate": ({"prompt": "a\ud800"}, "prompt holds half of a surrogate pair at character 1"),
    "chat option": ({"messages": []}, "unknown option 'messages'"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_options_get_400_in_one_line(http, options, message):
    body = json.dumps({"prompt": "x", "max_tokens": 1, **options})
    answer = http.post("/v1/completions", content=body.encode(), headers=JSON)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


WRONG_CHATS = {
    "none": ({"messages": []}, "messages=[] must be a list of at least one message"),
    "role": ({"messages": [{"role": "usr", "content": "x"}]}, "messages[0].role='usr' must be one of"),
    "content": ({"messages": [{"role": "user"}]}, "messages[0].content=None must be a string"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "unknown option 'messages[0].content[0].image_url'",
    ),
    "template": (
        {"messages": [{"role": "assistant", "content": "x"}]},
        "do not fit the model's chat template: \"the last message must be the user's\"",
    ),
    "tools": ({"tools": [{"type": "function"}]}, "tools=[{'type': 'function'}] is not supported; leave it out"),
    "format": ({"response_format": {"type": "json_object"}}, "response_format.type='json_object' must be one of text"),
    "two lengths": ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens=1 and max_completion_tokens=2 differ"),
}


@pytest.mark.parametrize(("options", "message"), WRONG_CHATS.values(), ids=WRONG_CHATS.keys())
def test_wrong_chats_get_400_in_one_line(http, options, message):
    messages = [{"role": "user", "content": "x"}]
    answer = http.post("/v1/chat/completions", json={"messages": messages, **options})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_other_paths_methods_and_types_say_what_there_is(http):
    for answer, status, message in (
        (http.get("/v1/engines"), 404, "GET '/v1/engines' is not here; try one of /health"),
        (http.get("/v1/completions"), 405, "the method is not allowed"),
        (http.post("/v1/completions", data={"prompt": "x"}), 415, "must be application/json"),
        (http.post("/v1/completions", content=b"{}" * 60_000, headers=JSON), 413, "at most 100000 bytes"),
        (http.post("/v1/completions", content=iter([b"{}" * 60_000]), headers=JSON), 413, "at most 100000 bytes"),
        (http.post("/v1/completions", content=b"[" * 50_000, headers=JSON), 400, "nested too deeply"),
        (http.post("/v1/completions", content=b'{"prompt": "\xff"}', headers=JSON), 400, "byte 12 is not"),
        (http.post("/v1/completions", content=b'{"top_p": NaN}', headers=JSON), 400, "NaN is no number of JSON"),
        (http.post("/v1/completions", content=b"", headers=JSON), 400, "must be JSON"),
    ):
        assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True), answer.text


def test_bytes_that_are_no_http_get_400(served):
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400 ")


def test_addresses_that_cannot_be_listened_on_are_one_line():
    with pytest.raises(ConfigError, match=r"--host .nowhere\.invalid. is no address of this machine"):
        listen_on("nowhere.invalid", 0)
    with (
        listen_on("127.0.0.1", 0) as taken,
        pytest.raises(ConfigError, match=r"cannot be listened on: .*; try --port 0"),
    ):
        taken.listen()
        listen_on("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ConfigError, match="requests=0 must be a whole number of at least 1; try 1"):
        Limits(requests=0)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None), max_size=20)
    | st.sampled_from([10**400, "x" * 3000, [], {}, [[1]], ["a", 1], "text", "user"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def bodies(fields, **good):
    """Objects with some options right and others anything at all."""
    names = st.sampled_from([*fields, "nonsense", "\ud800"])
    return st.dictionaries(names, JUNK, max_size=5).map(lambda junk: good | junk)


REQUESTS = st.one_of(
    st.tuples(st.just("/v1/completions"), bodies(COMPLETION, prompt="x", max_tokens=1).map(json.dumps)),
    st.tuples(
        st.just("/v1/chat/completions"),
        bodies(CHAT, messages=[{"role": "user", "content": "x"}], max_tokens=1).map(json.dumps),
    ),
    st.tuples(
        st.just("/v1/chat/completions"),
        st.lists(bodies(["role", "content", "name"], role="user"), max_size=3).map(
            lambda messages: json.dumps({"messages": messages, "max_tokens": 1})
        ),
    ),
    st.tuples(
        st.sampled_from(["/v1/completions", "/v1/chat/completions"]), st.binary(max_size=60) | JUNK.map(json.dumps)
    ),
)


@given(REQUESTS)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_request_crashes_the_server(served, http, request_of):
    path, body = request_of
    content = body if isinstance(body, bytes) else body.encode()
    answer = http.post(path, content=content, headers=JSON)
    if answer.status_code != 200:
        assert 400 <= answer.status_code < 500, answer.text
        message = answer.json()["error"]["message"]
        assert message and "\n" not in message and len(message) < 500
    assert served.service.health() is None
    assert len(served.service.desk) <= 1  # the last one may not have closed yet


@given(st.binary(max_size=200))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_bytes_crash_the_server(served, http, junk):
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(junk)
    assert http.get("/health").status_code == 200
