"""The folder that a run writes: which files it holds, and that no earlier run is lost to it."""

from pathlib import Path
from tempfile import TemporaryDirectory

from jaxpipe.errors import ConfigError


class RunFolder:
    """Names the files of a run. Nothing is written before `make`.

    Args:
        path: The folder.
        overwrite: Accept a folder that is not empty; the run then replaces its own files there, no others.
        lead: Whether this process is the one that writes. The files of any other go to a temporary folder, which ends
            with the run.

    Raises:
        ConfigError: The folder holds something and may not be overwritten, or the path is no folder.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False, lead: bool = True):
        self.path = Path(path)
        self._scratch = None if lead else TemporaryDirectory(prefix="jaxpipe-")
        own = self.path if self._scratch is None else Path(self._scratch.name)
        self.config = own / "config.toml"
        self.metrics = own / "metrics.jsonl"
        self.loss = own / "loss.png"
        self.schedule = own / "schedule.svg"
        self.sample = own / "sample.txt"
        if not lead:
            return
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(
                f"train.out={str(path)!r} must be a folder, a file is there; try train.out={str(path) + '-run'!r}"
            )
        if self.path.is_dir() and any(self.path.iterdir()) and not overwrite:
            raise ConfigError(
                f"train.out={str(path)!r} already holds a run; to start over delete that folder or pass "
                "train.overwrite=true, to keep it pass another train.out=…"
            )

    def make(self):
        """Makes the folder and clears the files of an earlier run.

        Raises:
            ConfigError: The folder cannot be made.
        """
        if self._scratch is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for file in (self.config, self.metrics, self.loss, self.schedule, self.sample):
                file.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(
                f"train.out={str(self.path)!r} cannot be written: {error}; try another train.out=…"
            ) from error
