"""The folder that a run writes: which files it holds, and that no earlier run is lost to it.

A run marks its folder, by ``.jaxpipe``, before it writes anything else there. So whatever instant it is killed at, the
same command is known to go on with it; and files are replaced as a whole, so none is ever half there.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jaxpipe.checkpoint.lock import Lock
from jaxpipe.checkpoint.owned import OWN
from jaxpipe.errors import ConfigError, JaxpipeError, UnavailableError

START = "JAXPIPE_START"
"""Environment variable that names a start. What makes a run start over counts once for each name."""
_PASSES = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE}


class RunFolder:
    """Names the files of a run. Nothing is written before it is locked.

    Args:
        path: The folder.
        overwrite: Accept a folder that is not empty; the run then replaces its own files there, no others.
        resume: Accept a folder with a run that can be gone on with.
        saves: Whether the run has checkpoints to go on from.
        lead: Whether this process is the one that writes. The files of any other go to a temporary folder, which ends
            with the run.

    Attributes:
        begun: The run has begun here by a command of the same name, see `START`: it goes on, whatever the command
            says of starting over.

    Raises:
        ConfigError: The folder holds something and may not be overwritten, or the path is no folder.
        UnavailableError: Another run is using it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        resume: bool = False,
        saves: bool = True,
        lead: bool = True,
    ):
        self.path = Path(path)
        self._scratch = None if lead else TemporaryDirectory(prefix="jaxpipe-")
        own = self.path if self._scratch is None else Path(self._scratch.name)
        self.config = own / "config.toml"
        self.metrics = own / "metrics.jsonl"
        self.loss = own / "loss.png"
        self.schedule = own / "schedule.svg"
        self.sample = own / "sample.txt"
        self.page = own / "report.html"
        self.heartbeat = own / "heartbeat.json"
        self.wandb_id = own / "wandb-id.txt"
        self.watchdog = self.path / ("watchdog.log" if lead else f"watchdog-{os.getpid()}.log")
        self.checkpoints = self.path / "checkpoints"
        self._start = self.path / OWN / "start"
        self._known = False
        self.begun = self._read_start() == os.environ.get(START, "") != ""
        if not lead:
            return
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(
                f"train.out={str(path)!r} must be a folder, a file is there; try train.out={str(path) + '-run'!r}"
            )
        self._lock().check()
        self._check(overwrite or self.begun, resume, saves)

    def _check(self, overwrite: bool, resume: bool, saves: bool) -> None:
        """Checks that nothing that somebody may still want is lost."""
        names = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
        self._known = bool(names & {OWN, self.heartbeat.name, self.config.name})
        numbers = self.metrics.name in names and self.metrics.stat().st_size > 0
        if not names or overwrite or (self._known and ((resume and saves) or not numbers)):
            return
        if names & {OWN, self.heartbeat.name, self.config.name, self.metrics.name}:
            raise ConfigError(
                f"train.out={str(self.path)!r} already holds a run; to start over delete that folder or pass "
                "train.overwrite=true, to keep it pass another train.out=…"
            )
        raise ConfigError(
            f"train.out={str(self.path)!r} holds files of something else; pass another train.out=…, or "
            "train.overwrite=true to write beside them"
        )

    @contextmanager
    def locked(self, note: Callable[[str], Any]) -> Iterator[None]:
        """Keeps other runs out while entered, and makes the folder.

        Args:
            note: Is told that a lock of another machine is waited for.

        Raises:
            UnavailableError: Another run is using it, or it cannot be written now.
            ConfigError: It cannot be made.
        """
        with ExitStack() as stack:
            with self.writing():
                if self._scratch is None:
                    stack.enter_context(self._lock(note))
            yield

    def make(self, *, keep_metrics: bool = False):
        """Makes the folder and clears the files of an earlier run; its checkpoints stay.

        Args:
            keep_metrics: The run goes on and so do its metrics.

        Raises:
            ConfigError: The folder cannot be written.
        """
        if self._scratch is not None:
            return
        with self.writing():
            self.path.mkdir(parents=True, exist_ok=True)
            files = [self.loss, self.schedule, self.sample, self.page]
            for file in files if keep_metrics else [*files, self.metrics, self.wandb_id, self.heartbeat]:
                file.unlink(missing_ok=True)

    def begin(self, config: str) -> None:
        """Writes the config and notes that the run has begun: from now on the same start only goes on with it.

        Raises:
            ConfigError: The folder cannot be written.
        """
        self.write(self.config, config)
        if self._scratch is None and (start := os.environ.get(START)):
            self.write(self._start, start)

    def write(self, file: Path, text: str) -> None:
        """Writes one of the files; it is replaced as a whole.

        Raises:
            ConfigError: It cannot be written.
        """
        part = file.with_name(f"{file.name}.part")
        with self.writing():
            try:
                part.write_text(text, encoding="utf-8")
                part.replace(file)
            except OSError:
                with suppress(OSError):
                    part.unlink(missing_ok=True)
                raise

    def write_late(self, file: Path, text: str, note: Callable[[str], Any]) -> None:
        """Writes one of the files at the end of a run, which a full disk does not undo.

        Args:
            file: The file.
            text: What it holds.
            note: Is told where it cannot be written.
        """
        try:
            self.write(file, text)
        except JaxpipeError as error:
            note(f"{file.name:<10} left out: {error}")

    def _lock(self, note: Callable[[str], Any] = lambda text: None) -> Lock:
        return Lock(self.path / OWN / "run.lock", f"train.out={str(self.path)!r}", note)

    def _read_start(self) -> str:
        try:
            return self._start.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return ""

    @contextmanager
    def writing(self) -> Iterator[None]:
        """While entered, what fails to be written is an error of the folder.

        Raises:
            UnavailableError: It is a run's folder, or the disk is full: it can be written again some time.
            ConfigError: Else.
        """
        try:
            yield
        except OSError as error:
            text = f"train.out={str(self.path)!r} cannot be written: {error}"
            if self._known or error.errno in _PASSES:
                raise UnavailableError(f"{text}; the same command goes on when it can") from error
            raise ConfigError(f"{text}; try another train.out=…") from error
