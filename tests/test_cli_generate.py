"""`jaxpipe generate` and `jaxpipe serve`: wrong input is one line before anything is loaded; right input end to end."""

import pytest

from jaxpipe.cli import main

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
