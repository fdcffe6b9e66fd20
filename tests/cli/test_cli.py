"""The command line: exit codes, one line per error, and runs in a process of their own."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from jaxpipe.cli.main import main

CONFIG = """
[model]
num_layers = 2
num_heads = 2
d_model = 16
bias = false

[data]
source = "text"
train = ["text.txt"]

[mesh]
pipe = 2

[schedule]
repeats = 1
microbatches = 4

[train]
steps = 3
batch_size = 8
seq_len = 16
log_every = 1
out = "run"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a config and its text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(CONFIG)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    (tmp_path / "empty.txt").touch()
    np.array([1, 2, 300] * 100, np.uint16).tofile(tmp_path / "ids.bin")
    return tmp_path


def start(*arguments) -> subprocess.Popen:
    """`python -m jaxpipe` with one real CPU device."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    return subprocess.Popen(
        [sys.executable, "-m", "jaxpipe", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"JAX_PLATFORMS": "cpu"},
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_a_run_on_simulated_devices_exits_0_and_says_where_it_wrote(folder):
    code, out, err = finish(start("train", "small.toml", "mesh.simulate=2", "sample.length=10", "sample.prompt=the "))
    assert (code, err) == (0, "")
    assert "2 × simulated CPU, pipe=2" in out
    assert "step 3/3  loss " in out
    assert "--- sample ---\nthe " in out
    files = "checkpoints, config.toml, heartbeat.json, loss.png, metrics.jsonl, report.html, sample.txt, schedule.svg"
    assert f"run holds {files}" in out.splitlines()[-1]
    assert {path.name for path in (folder / "run").iterdir()} >= {"config.toml", "loss.png", "schedule.svg"}
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3]


def test_too_few_devices_exits_2_and_says_how_to_simulate_them(folder):
    code, _, err = finish(start("train", "small.toml"))
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith("jaxpipe: error: mesh.pipe=2 needs 2 devices but there is 1 (cpu); try ")
    assert "mesh.simulate=2" in err


def test_ctrl_c_exits_3_with_metrics_and_curves(folder):
    process = start("train", "small.toml", "mesh.simulate=2", "train.steps=100000", "train.eval_every=0")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step      3/"):
            break
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, err) == (3, "")
    assert "stopped    by SIGINT after " in out
    assert "the same command goes on" in out
    assert (folder / "run" / "loss.png").exists()
    assert len((folder / "run" / "metrics.jsonl").read_text().splitlines()) >= 4


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["schedule", "--list"],
        ["schedule", "zb_v", "--devices", "4", "--microbatches", "99", "--json"],
        ["schedule", "1f1b", "--devices", "4", "--microbatches", "999"],
    ],
)
def test_a_reader_that_has_left_ends_a_command_without_a_word(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "jaxpipe", *arguments], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_leaves_stops_a_run_which_is_saved(folder):
    process = start("train", "small.toml", "mesh.simulate=2", "train.steps=100000", "train.eval_every=0")
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if line.startswith("step      3/"):
            break
    process.stdout.close()
    with process.stderr:
        err = process.stderr.read()
    assert process.wait(timeout=300) == 3
    assert not any(word in err for word in ("Traceback", "Broken", "Exception"))
    assert len(list((folder / "run" / "checkpoints").iterdir())) >= 1


def test_a_loss_that_is_not_finite_exits_1(folder, capsys):
    one_device = ("model.num_layers=1", "mesh.pipe=1", "schedule.repeats=1")
    code = main(["train", "small.toml", *one_device, "optim.learning_rate=1e30", "optim.clip_norm=0", "train.steps=5"])
    out, err = capsys.readouterr()
    assert code == 1
    assert err.startswith("jaxpipe: error: ")
    assert "; last good: step " in err
    assert len(err.splitlines()) == 1
    assert "step 1/5" in out


def test_a_second_run_says_how_to_start_over_and_keeps_the_first(folder, capsys):
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text("precious")
    assert main(["train", "small.toml"]) == 2
    assert "train.overwrite=true" in capsys.readouterr().err
    assert (folder / "run" / "metrics.jsonl").read_text() == "precious"


BAD = {
    "missing config": (["nowhere.toml"], "config file nowhere.toml does not exist"),
    "unknown key": (["small.toml", "train.step=3"], "unknown key train.step; did you mean train.steps?"),
    "no override": (["small.toml", "train.steps"], "must have the form section.key=value"),
    "wrong type": (["small.toml", "train.steps=few"], "train.steps='few' must be a whole number"),
    "batch": (["small.toml", "train.batch_size=6"], "train.batch_size=6 must be divisible by"),
    "layers": (
        ["small.toml", "model.num_layers=3", "mesh.pipe=2", "mesh.simulate=2"],
        "model.num_layers=3 must be a multiple of mesh.pipe=2 * schedule.repeats=",
    ),
    "few microbatches": (
        ["small.toml", "schedule.name=dualpipe_v", "schedule.microbatches=2", "mesh.pipe=2", "schedule.repeats=2"],
        "schedule.microbatches=2 must be at least 2*mesh.pipe=4 for dualpipe_v; try 4",
    ),
    "attention": (
        ["small.toml", "model.attention=flash"],
        "model.attention='flash' must be one of 'auto', 'xla', 'cudnn', 'blockwise'; try 'auto'",
    ),
    "schedule": (["small.toml", "schedule.name=interleaved"], "interleaved_1f1b"),
    "missing text": (["small.toml", "data.train=nowhere.txt"], "'nowhere.txt' matches no file"),
    "empty text": (["small.toml", "data.train=empty.txt"], "empty.txt holds no text"),
    "short text": (["small.toml", "train.seq_len=5000"], "tokens must be at least train.seq_len+1=5001"),
    "token id": (
        ["small.toml", "data.source=tokens", "data.train=ids.bin", "model.vocab_size=256"],
        "ids.bin: token id 300 must be below model.vocab_size=256",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_wrong_input_exits_2_with_one_line(folder, capsys, arguments, message):
    assert main(["train", *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("jaxpipe: error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert out == ""
    assert not (folder / "run").exists()


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["train", "--fast", "small.toml"]])
def test_wrong_arguments_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert re.fullmatch(r"jaxpipe( train)?: error: .* \(see jaxpipe( train)? --help\)\n", capsys.readouterr().err)


def test_help_and_version_need_no_jax():
    script = (
        "import sys; from jaxpipe.cli import main\ntry: main([sys.argv[1]])\nfinally: assert 'jax' not in sys.modules"
    )
    for flag in ("--help", "--version"):
        done = subprocess.run([sys.executable, "-c", script, flag], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "jaxpipe" in done.stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian"], "'trian' is no COMMAND; did you mean train? (see jaxpipe --help)"),
        (["schedule", "zb_v", "--devces", "4"], "unknown argument --devces 4; did you mean --devices?"),
        (["checkpoint", "lst", "runs"], "'lst' is no ACTION; did you mean ls?"),
        (["checkpoint", "ls", "runs", "--jsn"], "unknown argument --jsn; did you mean --json?"),
        (["schedule", "zb_v", "--devices", "four"], "argument --devices: invalid int value: 'four'"),
        (["qqqq"], "'qqqq' is no COMMAND; there are train, config, schedule"),
    ],
)
def test_wrong_words_exit_2_with_one_line_that_says_which_is_meant(words, line, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and not printed.out
    assert printed.err.count("\n") == 1 and line in printed.err
