"""`jaxpipe generate` and `jaxpipe serve`: wrong input is one line before anything is loaded; right input end to end."""

import io
import json
import os
import signal
import socket
import sys
import threading
import time

import openai
import pytest
from serving import wait_for

from jaxpipe.cli.main import main
from jaxpipe.serve import listen_on

WRONG = {
    "nothing": (["generate", "run"], "there is nothing to continue; try --prompt TEXT"),
    "both": (["generate", "run", "--prompt", "x", "--json", "--stream"], "--stream has no effect with --json"),
    "several": (
        ["generate", "run", "--prompt", "x", "y", "--stream"],
        "--stream writes one answer but 2 are asked for",
    ),
    "logprobs": (["generate", "run", "--prompt", "x", "--logprobs"], "--logprobs has no effect without --json"),
    "file": (["generate", "run", "--prompt-file", "nowhere.txt"], "'nowhere.txt' cannot be read: No such file"),
    "bytes": (["generate", "run", "--prompt-file", "latin.txt"], "latin.txt must be UTF-8 but byte 1 is not"),
    "devices": (["generate", "run", "--prompt", "x", "--pipe", "0"], "--pipe 0 must be at least 1; try 1"),
    "type": (["generate", "run", "--prompt", "x", "--cache-dtype", "int8"], "--cache-dtype 'int8' must be one of"),
    "slots": (["serve", "run", "--slots", "0"], "--slots 0 must be at least 1; try 1"),
    "port": (["serve", "run", "--port", "70000"], "--port 70000 must be at most 65535; try 8000"),
    "timeout": (["serve", "run", "--timeout", "0"], "--timeout 0 must be a number of seconds above 0; try 30"),
    "key": (["serve", "run", "--api-key", ""], "--api-key '' must have at least 1 character"),
    "host": (["serve", "run", "--host", "nowhere.invalid", "--api-key", "x"], "is no address of this machine"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_exits_2_with_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, len(err.splitlines())) == ("", 1)


def test_serve_without_its_extra_says_what_to_install(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("jaxpipe.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "run"]) == 2
    assert capsys.readouterr().err == 'jaxpipe: error: a server needs uvicorn; try pip install "jaxpipe[serve]"\n'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step on bytes."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    (folder / "small.toml").write_text(CONFIG.format(folder))
    assert main(["train", str(folder / "small.toml")]) == 0
    return str(folder / "run")


CONFIG = """
model = {{num_layers = 1, num_heads = 2, d_model = 16}}
data = {{source = "text", train = ["{0}/text.txt"]}}
mesh = {{pipe = 1}}
schedule = {{name = "1f1b", repeats = 1, microbatches = 1}}
train = {{steps = 1, batch_size = 2, seq_len = 32, out = "{0}/run"}}
"""
ONE = ("--pipe", "1", "--data", "1")


def test_generate_writes_text_and_numbers(run, capsys, monkeypatch):
    assert main(["generate", run, *ONE, "--prompt", "the ", "--max-new-tokens", "6", "--stream"]) == 0
    text = capsys.readouterr().out.removesuffix("\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the ")))
    options = ["--prompt", "-", "a", "-n", "2", "--max-new-tokens", "6", "--json", "--logprobs"]
    assert main(["generate", run, *ONE, *options]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert [(answer["prompt"], answer["index"]) for answer in answers] == [("the ", 0), ("the ", 1), ("a", 0), ("a", 1)]
    assert answers[0]["text"] == answers[1]["text"] == text
    for answer in answers:
        assert len(answer["tokens"]) == len(answer["logprobs"]) == 6
        assert (bytes(answer["tokens"]).decode(errors="replace"), answer["finish_reason"]) == (answer["text"], "length")
    assert main(["generate", run, *ONE, "--prompt", "x" * 40]) == 2
    assert "a prompt of 40 tokens exceed the model's 32; shorten the prompt" in capsys.readouterr().err


def test_serve_answers_until_a_signal_comes(run, capsys):
    with listen_on("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
    told = []

    def ask():
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="key", max_retries=0) as client:
            wait_for(lambda: is_up(port), 300)
            try:
                told.append(client.models.list().data[0].id)
                stream = client.completions.create(model="run", prompt="the ", max_tokens=20, stream=True)
                told.extend(chunk.choices[0].finish_reason for chunk in stream)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # not the end of pytest, if it comes too early
    client = threading.Thread(target=ask)
    client.start()
    try:
        code = main(["serve", run, *ONE, "--port", str(port), "--api-key", "key", "--slots", "2", "--grace", "20"])
    finally:
        client.join()
        signal.signal(signal.SIGTERM, before)
    assert code == 0
    assert told[0] == "run" and told[-1] == "length"
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("cache      2 answers of 32 tokens, ")
    assert out[1:] == [
        f"serving    run at http://127.0.0.1:{port}/v1",
        "stopping   by SIGTERM: 0 requests may finish within 20 s",
    ]


def is_up(port: int) -> bool:
    time.sleep(0.2)  # tracing needs the interpreter
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0
