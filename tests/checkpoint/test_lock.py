"""A lock is held by who holds it, whatever its file says, and by nobody who is gone."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from jaxpipe.checkpoint import lock as module
from jaxpipe.checkpoint.lock import LEASE_S, Lock
from jaxpipe.errors import UnavailableError


def never(seconds: float):
    raise AssertionError("nobody is waited for")


def test_the_second_is_refused_with_the_name_of_the_first_and_comes_in_after_it(tmp_path):
    file = tmp_path / "a" / "run.lock"
    with Lock(file, "train.out='a'"):
        name = rf"train\.out='a' is in use by another run, process {os.getpid()} on '{socket.gethostname()}'; wait"
        for enter in (Lock(file, "train.out='a'").__enter__, Lock(file, "train.out='a'").check):
            with pytest.raises(UnavailableError, match=name):
                enter()
    Lock(file, "").check()
    with Lock(file, ""):
        pass


def test_a_holder_that_was_killed_holds_nothing(tmp_path):
    file = tmp_path / "run.lock"
    lock = f"runpy.run_path({module.__file__!r})['Lock']({type(file).__name__}({str(file)!r}), '')"
    code = f"import os, runpy; from pathlib import *; {lock}.__enter__(); os.kill(os.getpid(), 9)"
    child = subprocess.run([sys.executable, "-c", code])
    assert child.returncode == -signal.SIGKILL
    assert json.loads(file.read_text())["pid"] != os.getpid()
    file.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getppid()}))  # its number lives, in another
    Lock(file, "").check()
    with Lock(file, "", sleep=never):
        assert json.loads(file.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 3}', "\x00" * 40, "[" * 900], ids=repr)
def test_a_file_that_names_nobody_stops_nobody(tmp_path, text):
    (tmp_path / "run.lock").write_text(text)
    with Lock(tmp_path / "run.lock", "", sleep=never):
        pass


@pytest.mark.parametrize(("age_s", "waits"), [(0.0, True), (LEASE_S + 1, False)])
def test_a_holder_on_another_machine_is_outwaited(tmp_path, age_s, waits):
    file = tmp_path / "run.lock"
    file.write_text('{"host": "elsewhere", "pid": 7}')
    touched = file.stat().st_mtime - age_s
    os.utime(file, (touched, touched))
    notes, slept = [], []
    with Lock(file, "train.out='a'", notes.append, slept.append):
        assert bool(slept) == waits
        assert sum(slept) <= LEASE_S
    assert len(notes) == waits
    assert all("process 7 on 'elsewhere' still has train.out='a'" in note for note in notes)


def test_a_holder_on_another_machine_that_lives_is_believed(tmp_path):
    file = tmp_path / "run.lock"
    file.write_text('{"host": "elsewhere", "pid": 7}')
    lives = Lock(file, "train.out='a'", sleep=lambda seconds: os.utime(file, (1e9, 1e9)))
    with pytest.raises(UnavailableError, match=r"train\.out='a' is in use by another run, process 7 on 'elsewhere'"):
        lives.__enter__()


def test_without_locks_of_the_file_system_the_process_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_locked", lambda fd: None)
    file = tmp_path / "run.lock"
    file.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    with pytest.raises(UnavailableError, match="in use"):
        Lock(file, "", sleep=lambda seconds: os.utime(file, (1e9, 1e9))).__enter__()
    file.write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1}))
    with Lock(file, "", sleep=never):
        pass
