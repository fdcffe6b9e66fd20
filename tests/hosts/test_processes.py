"""Processes that start, stop and fail together: the protocol in threads, whole runs in processes of their own."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxpipe as jp
from jaxpipe.errors import ConfigError, DataError
from jaxpipe.hosts import Crew, Place, find_place
from jaxpipe.hosts.hub import Hub, differences
from jaxpipe.hosts.line import LineError
from jaxpipe.hosts.roll_call import _proof as proof_of, answer, gather
from jaxpipe.hosts.share import put_rows
from jaxpipe.train import load, train

ROOT = Path(__file__).parents[2]
CONFIG = """
[model]
num_layers = 4
num_heads = 2
d_model = 16
bias = false

[data]
source = "text"
train = ["text.txt"]

[mesh]
pipe = 4
data = 2

[schedule]
microbatches = 4

[train]
steps = 10
batch_size = 16
seq_len = 16
eval_every = 0
eval_batches = 1
log_every = 1
out = "run"
"""
SMALLEST = ("model.num_layers=2", "mesh.pipe=2", "mesh.data=1", "schedule.microbatches=2", "train.steps=100000")
"""The quickest run of two processes to compile, one device in each."""


# --- which process is this ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, None, 1), r"--process-id 1 must come with --coordinator and --num-processes"),
        (("a:1", 2, None), r"--coordinator a:1, --num-processes 2 must come with --process-id"),
        (("a:1", 2, 2), r"--process-id 2 must be from 0 to 1 for --num-processes 2; try 1"),
        (("a:1", 2, -1), r"--process-id -1 must be from 0 to 1 .*; try 0"),
        (("a:1", 0, 0), r"--num-processes 0 must be at least 1"),
        (("node7", 2, 0), r"--coordinator 'node7' must have the form host:port .*; try node7:55527"),
        (("node7:port", 2, 0), r"try node7:55527"),
        ((":99", 2, 0), r"must have the form host:port"),
        (("a:70000", 2, 0), r"a port from 1 to 65535"),
        ((None, None, None), r"neither SLURM \(srun\), Open MPI \(mpirun\) nor Kubernetes .*; try --coordinator"),
    ],
)
def test_a_wrong_place_is_told(given, message):
    with pytest.raises(ConfigError, match=message):
        find_place(*given, environment={})


def test_a_place_is_taken_from_options_or_the_cluster(monkeypatch):
    assert find_place("[::1]:80", 2, 1, environment={"JAX_LOCAL_DEVICE_IDS": "2,3"}) == Place("[::1]:80", 2, 1, (2, 3))
    assert (Place("[::1]:80", 2, 1).host, Place("[::1]:80", 2, 1).port) == ("::1", 80)
    with pytest.raises(ConfigError, match=r"JAX_LOCAL_DEVICE_IDS='a' must be whole numbers"):
        find_place("a:1", 2, 1, environment={"JAX_LOCAL_DEVICE_IDS": "a"})
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "node[3-4]", "NTASKS": "4", "PROCID": "2", "LOCALID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert find_place() == Place("node3:61447", 4, 2, (0,))


# --- who is there ---


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def roll_call(*places: Place, timeout_s: float = 5.0) -> list:
    """What each place gets, or the exception that ends it."""

    def come(place: Place):
        try:
            return (gather if place.number == 0 else answer)(place, timeout_s)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(come, places))


def places(count: int, *numbers: int) -> list[Place]:
    address = f"localhost:{free_port()}"
    return [Place(address, count, number) for number in numbers]


def test_all_are_told_who_is_missing():
    here = places(4, 0, 2)
    text = f"processes 1, 3 of 4 did not arrive at {here[0].address} within 1 s; "
    for error in roll_call(*here, timeout_s=1.0):
        assert isinstance(error, LineError)
        assert str(error).startswith(text)


def test_process_0_that_does_not_come_is_named_with_its_address():
    (error,) = roll_call(*places(2, 1), timeout_s=0.3)
    assert isinstance(error, LineError)
    assert str(error).startswith("process 1 could not reach process 0 at localhost:")


def test_processes_that_do_not_fit_are_told_so():
    three, two = places(3, 0, 1), places(2, 1)
    for error in roll_call(three[0], Place(three[0].address, two[0].count, 1)):
        assert isinstance(error, ConfigError)
        assert "was started with --num-processes 2 and process 0 " in str(error)
    for error in roll_call(*places(3, 0, 1, 1)):
        assert isinstance(error, ConfigError)
        assert "two processes have --process-id 1, on " in str(error)


def test_strangers_are_ignored_and_who_comes_again_is_welcome():
    zero, one = places(2, 0, 1)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(gather, zero, 5.0)
        for stranger in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"", b'{"kind": "jaxpipe"}\n'):
            while True:
                try:
                    with socket.create_connection(("localhost", zero.port)) as sock:
                        sock.sendall(stranger)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)
        lines, hosts = pool.submit(answer, one, 5.0).result()
        assert set(waiting.result()[0]) == {1}
        assert set(hosts) == {0, 1}
        lines[0].close()
        waiting.result()[0][1].close()


def meeting(*given: Place, strangers: Sequence[Any] = (), timeout_s: float = 5.0) -> list:
    """What each place gets while strangers send lines to process 0 and keep their connections open."""
    zero, *others = given
    with ExitStack() as stack, ThreadPoolExecutor(len(given)) as pool:
        waiting = pool.submit(gather, zero, timeout_s)
        for line in strangers:
            while True:
                try:
                    sock = stack.enter_context(socket.create_connection((zero.host, zero.port)))
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)
            nonce = json.loads(sock.makefile("rb").readline())["nonce"]
            with suppress(OSError):
                sock.sendall(line if isinstance(line, bytes) else line(nonce))
        came = [pool.submit(answer, place, timeout_s) for place in others]
        return [future.exception() or future.result() for future in (waiting, *came)]


HELLO = {"kind": "jaxpipe", "number": 1, "count": 2, "host": "x", "proof": "0" * 64}
STRANGE = [
    b"",
    b"\xff\xfe\n",
    b"[" * 3000 + b"\n",
    b"{" * 100_000,
    b"x" * 100_000,
    b'{"kind": "jaxpipe", "number": 1e400}\n',
    b'{"kind": "jaxpipe", "number": ' + b"9" * 3000 + b"}\n",
    b'{"kind": {}}\n',
    *(
        json.dumps(HELLO | wrong).encode() + b"\n"
        for wrong in ({}, {"number": -1}, {"number": 0}, {"number": 1.5}, {"number": True}, {"count": 10**30})
    ),
    *(json.dumps(HELLO | wrong).encode() + b"\n" for wrong in ({"host": 5}, {"proof": None}, {"proof": "\u00e9"})),
]


def proven(token="", **facts):
    """A hello of somebody who knows the protocol."""

    def line(nonce):
        said = {"number": 1, "count": 2, "host": "x"} | facts
        return json.dumps({"kind": "jaxpipe", **said, "proof": proof_of(token, nonce, said)}).encode() + b"\n"

    return line


@pytest.mark.parametrize("token", ["", "secret"])
def test_no_line_of_a_stranger_ends_or_holds_up_process_0(token):
    address = f"localhost:{free_port()}"
    given = [Place(address, 2, number, token=token) for number in (0, 1)]
    liars = [proven(token, number=number) for number in (0, -1, 2, 7)]
    liars += [proven("guess"), proven("guess", count=3)] if token else []
    began = time.monotonic()
    (lines, hosts), (back, _) = meeting(*given, strangers=[*STRANGE * 3, *liars])
    assert time.monotonic() - began < 4.0  # not one after the other, each for as long as it may be silent
    assert (set(lines), hosts) == ({1}, {0: socket.gethostname(), 1: socket.gethostname()})
    lines[1].close()
    back[0].close()


def test_a_process_with_another_token_is_told_so_and_the_others_go_on():
    address = f"localhost:{free_port()}"
    given = [Place(address, 2, number, token=token) for number, token in ((0, "a"), (1, "b"), (1, "a"))]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(gather, given[0], 10.0)
        with pytest.raises(ConfigError, match="JAXPIPE_TOKEN must be the same in all processes"):
            answer(given[1], 5.0)
        lines, _ = answer(given[2], 5.0)
        assert set(waiting.result()[0]) == {1}
        lines[0].close()
        waiting.result()[0][1].close()


def test_the_token_comes_from_the_environment_and_is_not_shown():
    place = find_place("a:1", 2, 1, environment={"JAXPIPE_TOKEN": "secret"})
    assert place.token == "secret"
    assert "secret" not in repr(place)


def test_process_0_listens_at_the_given_interface_only():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(gather, Place(f"127.0.0.1:{port}", 2, 0), 5.0)
        lines, _ = answer(Place(f"127.0.0.1:{port}", 2, 1), 5.0)
        waiting.result()[0][1].close()
        lines[0].close()
        waiting = pool.submit(gather, Place(f"127.0.0.1:{port}", 2, 0), 0.5)
        while not waiting.done():
            with pytest.raises(OSError):
                socket.create_connection(("127.0.0.2", port), timeout=0.2)
        assert isinstance(waiting.exception(), LineError)
    assert Place("127.0.0.1:1", 2, 0).interface() == "127.0.0.1"
    assert Place("localhost:1", 2, 0).interface() == "127.0.0.1"
    assert Place("192.0.2.1:1", 2, 0).interface() == ""  # none of this machine's


def test_a_machine_that_calls_itself_loopback_listens_for_others(monkeypatch):
    def named(*found):
        infos = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in found]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: infos)
        return Place("node7:1", 2, 0).interface()

    assert named("127.0.1.1") == ""  # as Debian has it in /etc/hosts
    assert named("127.0.0.1", "127.0.0.2") == ""
    assert named("192.0.2.1") == ""


def test_a_message_that_is_none_ends_the_run_in_one_line():
    for message in ({}, {"kind": []}, {"kind": "begun"}, {"kind": "begun", "steps": -1}, {"kind": "facts", "name": 1}):
        (end,) = Hub({0: "a", 1: "b"}).handle(1, message)
        assert end == {"kind": "end", "text": "process 1 (b) sent what is no message", "code": 1}


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"process 0 cannot listen on port {port} .*; try port {port + 1}"):
            gather(Place(f"localhost:{port}", 2, 0), 1.0)


# --- what process 0 decides ---


def test_all_stop_after_the_step_that_the_fastest_has_begun():
    hub = Hub({0: "a", 1: "b", 2: "c"})
    assert hub.handle(1, {"kind": "stop", "signal": "SIGTERM"}) == [{"kind": "ask"}]
    assert hub.handle(2, {"kind": "stop", "signal": "SIGINT"}) == []
    assert hub.handle(0, {"kind": "begun", "steps": 7}) == []
    assert hub.handle(2, {"kind": "begun", "steps": 8}) == []
    last = {"kind": "last", "step": 8, "why": "SIGTERM on process 1 (b)"}
    assert hub.handle(1, {"kind": "begun", "steps": 7}) == [last]


def test_the_first_failure_is_the_one_that_all_are_told():
    hub = Hub({0: "a", 1: "b"})
    end = {"kind": "end", "text": "process 1 (b): no", "code": 2}
    assert hub.handle(1, {"kind": "failed", "text": "no", "code": 2}) == [end]
    assert hub.handle(0, {"kind": "failed", "text": "Gloo", "code": 1}) == []
    assert hub.lost(1, "is gone") == []
    done = Hub({0: "a", 1: "b"})
    assert done.handle(1, {"kind": "done"}) == []
    assert done.handle(0, {"kind": "done"}) == [{"kind": "bye"}]
    assert done.lost(1, "is gone") == []


def test_differences_name_the_key_and_both_values():
    same = {"jax": "0.10.2", "train.steps": 9}
    assert differences({0: same, 1: dict(same)}) == ""
    text = differences({0: same, 1: dict(same), 2: {"jax": "0.10.3"}, 3: {"jax": "0.10.3"}})
    assert text == (
        "jax must be the same in all processes: 0.10.2 on process 0, 0.10.3 on process 2 and 1 more; "
        "train.steps must be the same in all processes: 9 on process 0, nothing on process 2 and 1 more"
    )
    many = differences({0: dict.fromkeys("abcde", 1), 1: dict.fromkeys("abcde", 2)})
    assert many.endswith("; and 2 more")


# --- crews in threads ---


class Ended(Exception):
    """Stands for the end of a process."""


def crews(count: int, **options) -> tuple[list[Crew], dict[int, int]]:
    """A crew in this process, and where the exit codes of its members will be."""
    met, codes = roll_call(*places(count, *range(count))), {}
    made = []
    for number, (lines, hosts) in enumerate(met):
        place = Place("localhost:1", count, number)
        made.append(Crew(place, lines, hosts, leave_process=lambda code, n=number: codes.update({n: code}), **options))
    return made, codes


def together(*actions) -> list:
    with ThreadPoolExecutor(len(actions)) as pool:
        return [future.result(timeout=20) for future in [pool.submit(action) for action in actions]]


def leave(crew: Crew) -> None:
    with crew:
        pass


def test_a_crew_agrees_stops_and_parts():
    made, codes = crews(3)
    together(*[lambda crew=crew: crew.agree("facts", {"a": 1}) for crew in made])
    meeting = threading.Barrier(3, timeout=10)

    def run(crew: Crew) -> int:
        step = 0
        while not crew.reached(step):
            if crew.place.number == 2 and step == 5:
                crew.want_stop("SIGTERM")
            meeting.wait()  # a collective: nobody leaves step n before all are in it
            step += 1
        return step

    steps = together(*[lambda crew=crew: run(crew) for crew in made])
    assert len(set(steps)) == 1 and steps[0] >= 6
    assert {crew.stopped_by for crew in made} == {f"SIGTERM on process 2 ({socket.gethostname()})"}
    together(*[lambda crew=crew: leave(crew) for crew in made])
    assert codes == {}


def test_a_crew_ends_with_the_error_of_one(capsys):
    made, codes = crews(3, exit_code=lambda error: 2)

    def fail() -> None:
        with made[1]:
            raise DataError("text.txt is empty")

    with pytest.raises(DataError):
        fail()
    made[0]._thread.join(10)
    made[2]._thread.join(10)
    assert codes == {0: 2, 1: 2, 2: 2}
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"jaxpipe: error: process 1 ({socket.gethostname()}): text.txt is empty"] * 3


@pytest.mark.parametrize("gone", [0, 1])
def test_a_process_that_is_gone_ends_the_others(gone, capsys):
    made, codes = crews(3)
    together(*[lambda crew=crew: crew.agree("facts", {}) for crew in made])
    made[gone]._over = True  # its thread ends, and answers nobody
    made[gone]._thread.join()
    made[gone]._close()
    others = [crew for crew in made if crew is not made[gone]]
    for crew in others:
        crew._thread.join(10)
    assert codes == {crew.place.number: 1 for crew in others}
    host = socket.gethostname()
    assert capsys.readouterr().err.count(f"process {gone} ({host}) ended without a word: killed or crashed") == 2


def test_a_process_that_is_silent_ends_the_others(capsys):
    made, codes = crews(2, silence_s=0.4)
    made[1]._over = True
    made[0]._thread.join(10)
    assert codes == {0: 1}
    assert "did not answer for 0.4 s" in capsys.readouterr().err
    made[1]._close()


def test_facts_that_differ_and_facts_that_never_come_end_all(capsys):
    made, codes = crews(2)
    together(*[lambda crew=crew: crew.agree("facts", {"train.steps": crew.place.number}) for crew in made])
    assert codes == {0: 2, 1: 2}
    host = socket.gethostname()
    assert f"train.steps must be the same in all processes: 0 on process 0 ({host}), 1 on" in capsys.readouterr().err
    late, _ = crews(2, patience_s=0.5)
    with pytest.raises(LineError, match=rf"process 1 \({host}\) did not come as far as facts within 0\.5 s"):
        late[0].agree("facts", {})
    together(*[lambda crew=crew: leave(crew) for crew in late])


def test_only_the_rows_of_own_devices_are_read():
    mesh, read = jp.make_mesh(pipe=2, data=4), []

    def rows(first: int, stop: int):
        read.append((first, stop))
        return {"tokens": np.arange(first, stop)[:, None]}

    sharding = NamedSharding(mesh, PartitionSpec("data"))
    batch = put_rows(rows, 8, sharding)
    assert read == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert batch["tokens"].sharding == sharding
    assert np.asarray(batch["tokens"]).ravel().tolist() == list(range(8))


# --- processes of their own ---


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a config and its text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(CONFIG)
    (tmp_path / "text.txt").write_text("".join(f"{i} squared is {i * i}.\n" for i in range(200)))
    return tmp_path


def environment(devices: int) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    return clean | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1"}


def start_two(*words: str, second: str | None = None) -> list[subprocess.Popen]:
    """Two processes of one run; the second has maybe an override of its own."""
    port = free_port()
    command = [sys.executable, "-m", "jaxpipe", "train", "small.toml", *SMALLEST, *words]
    return [
        subprocess.Popen(
            [*command, *own, f"--coordinator=localhost:{port}", "--num-processes=2", f"--process-id={number}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(1),
        )
        for number, own in enumerate([[], [second] if second else []])
    ]


def wait_for_step(process: subprocess.Popen, step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.split("/")[0].split() == ["step", str(step)]:
            return
    raise AssertionError("the run ended too soon")


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    done = [(process, *process.communicate(timeout=200)) for process in processes]
    return [(process.returncode, out, err) for process, out, err in done]


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("val_loss")) for line in lines if "loss" in line or "val_loss" in line]


def test_two_processes_learn_what_one_does(folder):
    """pipe=4 over two processes of 4 devices each: the second hop leaves the process."""
    launch = [sys.executable, str(ROOT / "scripts" / "launch_local.py"), "--processes=2", "--devices=4", "--"]
    words = ["train", "small.toml", "train.out=two", "sample.length=4"]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, env=environment(4), timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "[0] devices    8 × CPU, pipe=4 × data=2 × fsdp=1 × tensor=1 in 2 processes" in lines
    assert [line for line in lines if line.startswith("[1]")] == []
    one = train(load("small.toml", ["train.out=one"]))
    assert losses(folder / "two") == pytest.approx(losses(one.out), rel=2e-6)
    assert {path.name for path in (folder / "two").iterdir()} - {"sample.txt"} == {p.name for p in one.out.iterdir()}
    for out in ("one", "two"):  # what two have saved, one goes on with
        train(load("small.toml", [f"train.out={out}", "train.steps=12"]))
    assert losses(folder / "two") == pytest.approx(losses(folder / "one"), rel=2e-6)


def test_lines_of_gloo_are_left_out_though_they_come_in_pieces():
    without_gloo = runpy.run_path(str(ROOT / "scripts" / "launch_local.py"))["without_gloo"]
    text = "is connected to 1 peer ranks. Expected number of connected peer ranks is : 1"
    whole, torn = f"[Gloo] Rank 0 {text}\n", ["[Gloo] Rank [Gloo] Rank 01 is connected to 1\n", f" {text}\n"]
    run_on = [f"[Gloo] Rank 0 {text}[Gloo] Rank 1 {text}\n", "\n"]
    cut = ["[Gloo] Rank step 2\n", f"0 {text}\n"]
    shown = ["step 1\n", "12\n", "\n", "step 2\n", "3\n"]
    assert list(without_gloo([whole, "step 1\n", *torn, "12\n", *run_on, "\n", *cut, "3\n", whole])) == shown


def test_sigterm_to_one_stops_all_after_the_same_step(folder):
    processes = start_two("train.eval_every=0")
    wait_for_step(processes[0], 3)
    processes[1].send_signal(signal.SIGTERM)
    (code, out, err), other = finish(processes)
    assert (code, err) == (3, "")
    assert (other[0], other[2]) == (3, "")
    host = socket.gethostname()
    steps = len(losses(folder / "run")) - 1
    assert f"stopped    by SIGTERM on process 1 ({host}) after {steps} steps" in out


def test_a_killed_process_ends_the_other_with_a_message(folder):
    processes = start_two()
    wait_for_step(processes[0], 2)
    processes[1].kill()
    start = time.monotonic()
    (code, _, err), _ = finish(processes)
    assert time.monotonic() - start < 20
    assert code == 1
    assert f"jaxpipe: error: process 1 ({socket.gethostname()}) ended without a word: killed or crashed" in err


def test_a_run_that_cannot_start_ends_all_processes_alike(folder):
    host = socket.gethostname()
    cases = {
        "optim.eps must be the same in all processes: 1e-08 on": "optim.eps=1e-6",
        f"process 1 ({host}): unknown key train.step; did you mean train.steps?": "train.step=3",
    }
    running = [start_two(second=second) for second in cases]
    for processes, message in zip(running, cases, strict=True):
        for code, out, err in finish(processes):
            assert (code, out) == (2, "")
            assert err.startswith("jaxpipe: error: ")
            assert message in err
            assert len(err.splitlines()) == 1
    assert not (folder / "run").exists()


def test_options_that_do_not_go_together_exit_2(folder, capsys):
    from jaxpipe.cli.main import main

    for words, message in {
        ("--process-id=1",): "--process-id 1 must come with --coordinator and --num-processes",
        ("--start-timeout=5",): "--start-timeout 5 has no effect on one process",
        ("--distributed",): "neither SLURM (srun), Open MPI (mpirun) nor Kubernetes",
        ("--coordinator=localhost:1", "--num-processes=2", "--process-id=1", "--start-timeout=0"): "at least 1 second",
    }.items():
        assert main(["train", "small.toml", *words]) == 2
        assert message in capsys.readouterr().err
