"""The folder that a run writes: which files it holds, and that no earlier run is lost to it."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from jaxpipe.errors import ConfigError


class RunFolder:
    """Names the files of a run. Nothing is written before `make`.

    Args:
        path: The folder.
        overwrite: Accept a folder that is not empty; the run then replaces its own files there, no others.
        resume: Accept a folder with a run that can be gone on with: one that has left a heartbeat.
        lead: Whether this process is the one that writes. The files of any other go to a temporary folder, which ends
            with the run.

    Raises:
        ConfigError: The folder holds something and may not be overwritten, or the path is no folder.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False, resume: bool = False, lead: bool = True):
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
        if not lead:
            return
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(
                f"train.out={str(path)!r} must be a folder, a file is there; try train.out={str(path) + '-run'!r}"
            )
        resume = resume and self.heartbeat.exists()
        if self.path.is_dir() and any(self.path.iterdir()) and not overwrite and not resume:
            raise ConfigError(
                f"train.out={str(path)!r} already holds a run; to start over delete that folder or pass "
                "train.overwrite=true, to keep it pass another train.out=…"
            )

    def make(self, *, keep_metrics: bool = False):
        """Makes the folder and clears the files of an earlier run; its checkpoints stay.

        Args:
            keep_metrics: The run goes on and so do its metrics.

        Raises:
            ConfigError: The folder cannot be made.
        """
        if self._scratch is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            files = [self.config, self.loss, self.schedule, self.sample, self.page]
            for file in files if keep_metrics else [*files, self.metrics, self.wandb_id]:
                file.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def write(self, file: Path, text: str):
        """Writes one of the files.

        Raises:
            ConfigError: It cannot be written.
        """
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(f"train.out={str(self.path)!r} cannot be written: {error}; try another train.out=…")
