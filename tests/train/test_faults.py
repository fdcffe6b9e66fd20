"""What kills runs, done to real processes: nothing is lost but what came after the last finished save.

All processes are forked from one that has imported everything and started nothing, see `forked_runs`.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked_runs import Runs

from jaxpipe.checkpoint.owned import OWN
from jaxpipe.checkpoint.store import Store
from jaxpipe.cli.main import main
from jaxpipe.train.report.metrics import MetricsLog

CONFIG = """
[model]
num_layers = 1
num_heads = 1
d_model = 8
bias = false

[data]
source = "text"
train = ["{folder}/*.txt"]

[mesh]
pipe = 1

[schedule]
name = "1f1b"
microbatches = 1

[optim]
learning_rate = 1e-3
final_learning_rate = 1e-3
warmup_steps = 2

[train]
steps = 1000000
batch_size = 2
seq_len = 8
eval_every = 0
eval_batches = 1
log_every = 1
out = "{folder}/run"

[checkpoint]
every_steps = 1
keep = 4
"""


@pytest.fixture(scope="module")
def runs():
    """Starts runs in processes of their own."""
    with Runs() as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    (tmp_path / "run.toml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path


def lines(folder: Path, out: str = "run") -> list[dict]:
    return [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]


def wait_for(condition, what: str, timeout_s: float = 600.0, poll_s: float = 0.005):
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(poll_s)
    return found


def step_in(folder: Path) -> int:
    """The step of the newest line of metrics."""
    try:
        return int(json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    except (OSError, ValueError, IndexError):
        return -1


@pytest.mark.slow
def test_twenty_kills_lose_nothing_and_never_corrupt(runs, folder):
    rng, store = random.Random(0), Store(folder / "run" / "checkpoints")
    safe, torn, reached = 0, 0, 0

    def saving() -> bool:
        return any(store.path.glob(f"{OWN}/unfinished/*"))

    for kill in range(20):
        process = runs.start("train", f"{folder}/run.toml")
        wait_for(lambda at=reached: step_in(folder) > at, f"a step after {reached}")
        if kill % 2:
            wait_for(saving, "a save", poll_s=0.0)
        else:
            time.sleep(rng.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        assert process.wait()[0] == -signal.SIGKILL
        out = process.output()
        assert "damaged" not in out
        assert f"resumed    after step {safe}" in out if safe else "resumed" not in out
        torn += saving()
        steps = store.steps()
        assert max(steps, default=0) >= safe
        safe, reached = max(steps, default=0), step_in(folder)
    assert torn, "no kill hit a save"
    assert safe
    steps = safe + 3
    code, out = runs.start("train", f"{folder}/run.toml", f"train.steps={steps}").wait()
    assert code == 0, out
    whole = (f"train.steps={steps}", f"train.out={folder}/whole", "checkpoint.every_steps=0")
    assert runs.start("train", f"{folder}/run.toml", *whole).wait()[0] == 0
    killed, never = ([line["loss"] for line in lines(folder, out) if "loss" in line] for out in ("run", "whole"))
    assert len(killed) == steps
    assert killed == never


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_exits_3_and_the_same_command_goes_on(runs, folder, number):
    command = ("train", f"{folder}/run.toml", "checkpoint.every_steps=0", "checkpoint.grace_s=60")
    process = runs.start(*command)
    wait_for(lambda: step_in(folder) > 5, "step 6")
    process.send_signal(number)
    code, out = process.wait()
    assert code == 3, out
    assert f"stopped    by {number.name} after " in out
    assert "the same command goes on" in out
    (step,) = Store(folder / "run" / "checkpoints").steps()
    assert step == step_in(folder)
    code, out = runs.start(*command, f"train.steps={step + 2}").wait()
    assert code == 0, out
    assert f"resumed    after step {step}" in out
    assert f"train.steps was 1000000, is {step + 2}" in out
    assert [line["step"] for line in lines(folder) if "loss" in line] == list(range(1, step + 3))
    code, out = runs.start(*command, f"train.steps={step + 2}").wait()  # there is nothing left to do
    assert code == 0, out


def mounted(folder: Path, size: str) -> bool:
    """Puts a small file system on a folder, where that is allowed."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    return done.returncode == 0


def remount(folder: Path, options: str):
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True, capture_output=True)


DISKS = {"full": ("100k", "size=100k", "size=50m"), "read-only": ("50m", "ro", "rw")}


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a file system, which only root may do")
@pytest.mark.parametrize(("size", "bad", "good"), DISKS.values(), ids=DISKS)
def test_a_disk_that_is_full_or_read_only_does_not_stop_the_run(runs, folder, size, bad, good):
    disk = folder / "disk"
    if not mounted(disk, size):
        pytest.skip("this machine mounts no file systems")
    try:
        command = ("train", f"{folder}/run.toml", f"checkpoint.dir={disk}/checkpoints", "checkpoint.every_steps=50")
        (disk / "checkpoints").mkdir()
        if bad == "ro":
            remount(disk, "ro")
        else:
            (disk / "ballast").write_bytes(bytes(90_000))
        code, out = runs.start(*command, "train.steps=120", f"train.out={folder}/bad").wait()
        assert code == 1, out
        assert "was not saved: " in out and "the run goes on and tries again" in out
        assert "No space left" in out or "Read-only" in out or "RESOURCE_EXHAUSTED" in out
        assert "failed     the last state was not saved" in out
        assert not list((disk / "checkpoints").glob(f"{OWN}/unfinished/*"))  # which would hold the disk's last bytes
        assert "Traceback" not in out and "Error:" not in out
        assert [line["step"] for line in lines(folder, "bad") if "loss" in line] == list(range(1, 121))

        process = runs.start(*command, "train.steps=1000000")
        wait_for(lambda: "was not saved: " in process.output(), "a warning")
        remount(disk, good)  # the disk is back, and the next save is made
        wait_for(lambda: Store(disk / "checkpoints").steps(), "a save")
        process.send_signal(signal.SIGTERM)
        code, out = process.wait()
        assert code == 3, out
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a file system, which only root may do")
def test_a_run_on_a_disk_that_turned_read_only_can_be_started_again_later(runs, folder):
    disk = folder / "disk"
    if not mounted(disk, "50m"):
        pytest.skip("this machine mounts no file systems")
    try:
        command = ("train", f"{folder}/run.toml", f"train.out={disk}/run", "train.steps=3")
        assert runs.start(*command).wait()[0] == 0
        remount(disk, "ro")
        code, out = runs.start(*command, "train.steps=4").wait()
        assert code == 1, out  # not 2, at which a supervisor gives up
        assert "Read-only file system" in out and "the same command goes on when it can" in out
        assert "Traceback" not in out
        remount(disk, "rw")
        code, out = runs.start(*command, "train.steps=4").wait()
        assert code == 0, out
        assert "resumed    after step 3" in out
    finally:
        subprocess.run(["umount", disk], check=True)


def test_two_runs_in_one_folder_are_noticed(runs, folder):
    first = runs.start("train", f"{folder}/run.toml")
    wait_for(lambda: step_in(folder) > 0, "a step")
    for second in ((), (f"train.out={folder}/other", f"checkpoint.dir={folder}/run/checkpoints")):
        code, out = runs.start("train", f"{folder}/run.toml", "train.overwrite=true", *second).wait()
        assert code == 1, out
        assert f"is in use by another run, process {first.pid} on " in out
        assert "Traceback" not in out
    first.send_signal(signal.SIGKILL)
    assert first.wait()[0] == -signal.SIGKILL
    code, out = runs.start("train", f"{folder}/run.toml", f"train.steps={step_in(folder) + 1}").wait()
    assert code == 0, out
    assert "resumed    after step" in out


def test_a_run_that_hangs_ends_with_its_stacks_in_a_file(runs, folder):
    process = runs.start("train", f"{folder}/run.toml", "watchdog.timeout_s=5", hang_at=5)
    code, out = process.wait()
    assert code == 1, out
    assert "no sign of life for watchdog.timeout_s=5 s while running step 5; stacks are in " in out
    log = (folder / "run" / "watchdog.log").read_text()
    assert "forked_runs.py" in log and "hang" in log
    assert "cpu 0: no memory statistics\nend of devices" in log.lower()
    beat = json.loads((folder / "run" / "heartbeat.json").read_text())
    assert beat["step"] <= 5 and abs(beat["time"] - time.time()) < 600
    code, out = runs.start("train", f"{folder}/run.toml", "train.steps=20").wait()
    assert code == 0, out
    assert "resumed    after step" in out


def test_the_supervisor_starts_again_until_the_run_is_done(folder):
    """The script is run on a command that fails twice, is stopped once and then is done."""
    fake = folder / "fake.sh"
    fake.write_text(
        'n=$(cat count 2>/dev/null || echo 0); echo $((n + 1)) > count; echo "$@" >> words\n'
        'echo "$JAXPIPE_START" >> starts\n'
        "case $n in 0) exit 1;; 1) kill -9 $$;; 2) exit 3;; *) exit 0;; esac\n"
    )
    script = Path(__file__).parents[2] / "scripts" / "supervise.sh"
    environment = {**os.environ, "SUPERVISE_FIRST_WAIT_S": "0.1"}
    words = ["bash", script, "bash", fake, "a.toml", "train.overwrite=true", "train.steps=3"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (folder / "words").read_text().splitlines() == ["a.toml train.overwrite=true train.steps=3"] * 4
    first, *others = (folder / "starts").read_text().splitlines()
    assert first and others == [first] * 3
    (folder / "count").write_text("9")
    fake.write_text("exit 2\n")
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment, timeout=60)
    assert done.returncode == 2
    assert "bad arguments" in done.stderr


def test_metrics_go_on_after_a_torn_line(folder):
    path = folder / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    log = MetricsLog(path, after=1)
    log.write(step=2, loss=1.4)
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.4},
    ]


@pytest.mark.parametrize("content", ["empty", "foreign", "pickle"])
def test_a_foreign_directory_is_an_error_and_runs_nothing(tmp_path, content):
    folder = tmp_path / "7"
    folder.mkdir()
    if content == "foreign":
        (folder / "model.safetensors").write_bytes(b"x" * 100)
    if content == "pickle":
        bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
        for name in ("meta/metadata", "state/_METADATA", "state/manifest.ocdbt", "state/arr.npy"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(bomb)
    for command in (["checkpoint", "show"], ["checkpoint", "verify"], ["eval"]):
        assert main([*command, str(folder)]) in (1, 2)
    assert not (tmp_path / "ran").exists()
    shutil.rmtree(folder)
