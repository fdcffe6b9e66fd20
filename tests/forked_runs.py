"""Runs of `jaxpipe` in processes of their own, forked from one that has imported everything and started nothing.

A fork is a process like any other: it can be killed, and it has a JAX of its own, since none was started before. It
only saves the seconds that importing takes.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path


class Run:
    """One process and what it wrote."""

    def __init__(self, server: "Runs", pid: int, path: Path):
        self._server, self.pid, self._path = server, pid, path

    def send_signal(self, number: int):
        os.kill(self.pid, number)

    def wait(self) -> tuple[int, str]:
        """Exit code, negative for a signal, and all output."""
        return self._server.ask(["wait", self.pid]), self.output()

    def output(self) -> str:
        """All output so far."""
        return self._path.read_text() if self._path.exists() else ""


class Runs:
    """The process that is forked."""

    def __enter__(self) -> "Runs":
        self._folder = tempfile.TemporaryDirectory()
        self._count = 0
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=environment
            | {
                "JAX_PLATFORMS": "cpu",
                # Of use for one device only: CPU programs of several that come from the cache can order their
                # collectives differently and wait for each other for ever.
                "JAX_COMPILATION_CACHE_DIR": f"{self._folder.name}/cache",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            },
        )
        return self

    def __exit__(self, *_):
        self._process.communicate()  # no more requests, so it ends
        with suppress(ProcessLookupError):  # and what a failed test left running with it
            os.killpg(self._process.pid, signal.SIGKILL)
        self._folder.cleanup()

    def start(self, *words: str, hang_at: int = 0, kill: dict | None = None) -> Run:
        """Starts a run.

        Args:
            words: The command.
            hang_at: Step after which it waits for ever; 0 for none.
            kill: Arguments of `kill_at`, and of it ``cold``: whether nothing it needs was compiled before.
        """
        self._count += 1
        path = Path(self._folder.name) / f"{self._count}.txt"
        return Run(self, self.ask(["start", str(path), list(words), hang_at, kill]), path)

    def ask(self, request: list) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def hang(step: int):
    """Makes the run wait for ever after a step."""
    from jaxpipe.train.track import Track

    settle = Track.settle

    def hang_after(self, number, *rest):
        settle(self, number, *rest)
        while number == step:
            time.sleep(1.0)

    setattr(Track, "settle", hang_after)  # noqa: B010


def compile_anew(folder: str):
    """Has this process find nothing that was compiled before."""
    import jax

    jax.config.update("jax_compilation_cache_dir", folder)


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.utime", "shutil.rmtree"}


def kill_at(folder: str, change: int = 0, delay_s: float = 0.0):
    """Has this process killed, as by ``kill -9``: at once, or a little after a change to a file.

    Args:
        folder: Files below it count.
        change: Number of the change, as it is about to be made; 0 counts from the start of the process.
        delay_s: How long after it.
    """
    made = [0]

    def die():
        threading.Thread(
            target=lambda: (time.sleep(delay_s), os.kill(os.getpid(), signal.SIGKILL)), daemon=True
        ).start()

    def look(event: str, words: tuple):
        written = event == "open" and isinstance(words[2], int) and words[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (written or event in CHANGES) and str(words[0]).startswith(folder):
            made[0] += 1
            if made[0] == change and delay_s:
                die()
            elif made[0] == change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    atexit.register(lambda: print("changes", made[0], flush=True))
    if not change:
        die()


def serve():
    """Forks a run for each request."""
    import jaxpipe.train.evaluate  # noqa: F401
    from jaxpipe.cli.main import main

    for line in sys.stdin:
        what, *rest = json.loads(line)
        if what == "wait":
            _, status = os.waitpid(rest[0], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        path, words, hang_at, kill = rest
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            if hang_at:
                hang(hang_at)
            if kill and kill.pop("cold"):
                compile_anew(f"{path}.cache")
            if kill:
                kill_at(**kill)
            sys.exit(main(words))
        print(pid, flush=True)


if __name__ == "__main__":
    serve()
