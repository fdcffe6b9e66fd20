"""What in a folder of checkpoints is this program's own: only that is ever deleted.

A folder that a user names may hold anything. So nothing is told by its name alone:

- A save is written in ``FOLDER/.jaxpipe/unfinished``, which is made before anything else, and takes its place as
  ``FOLDER/STEP`` when it is whole. What killed saves leave lies in there, nowhere else.
- A whole checkpoint carries a file ``.jaxpipe``; one of an earlier version says what it is in its description.
- A deletion names its step in ``unfinished`` first, moves what a checkpoint consists of in there, the description
  first, and leaves what else somebody put into the checkpoint's folder.
"""

import os

from etils import epath

from jaxpipe.errors import CheckpointError

OWN = ".jaxpipe"
"""The folder of this program in a folder that a user names, and the file that marks a checkpoint."""
STATE, META, TEXT = "state", "meta", "metadata"
SAVING = ".orbax-checkpoint-tmp"
"""Part of the names that Orbax gives to what it has not written to the end."""
START = '{"format": "jaxpipe-checkpoint-'
"""What the description of a checkpoint begins with."""
_DELETING = ".deleting"
_COMMITTED = "commit_success.txt"


class Owned:
    """This program's part of a folder of checkpoints.

    Args:
        path: The folder.
    """

    def __init__(self, path: epath.Path):
        self.path = path
        self._unfinished = path / OWN / "unfinished"

    def steps(self) -> list[int]:
        """The steps of the finished checkpoints, ascending."""
        found = [int(entry.name) for entry in _entries(self.path) if _is_step(entry.name)]
        return sorted(step for step in found if (self._at(step) / META / TEXT).exists() and self.has(step))

    def has(self, step: int) -> bool:
        """Whether this program wrote the folder of a step. What is only linked there is somebody else's."""
        at = self._at(step)
        if os.path.islink(at):
            return False
        if (at / OWN).exists():
            return True
        try:
            return (at / META / TEXT).read_text().startswith(START)
        except (OSError, UnicodeDecodeError):
            return False

    def foreign(self) -> list[str]:
        """Names of what looks like a checkpoint, or like a save that was cut off, and is not this program's."""
        names = [entry.name for entry in _entries(self.path)]
        own = {str(step) for step in self.steps()}
        return sorted(name for name in names if (name.isdecimal() or SAVING in name) and name not in own)

    def room(self, step: int) -> epath.Path:
        """Where a save shall be written; nothing is there yet."""
        self._unfinished.mkdir(parents=True, exist_ok=True)
        return self._unfinished / str(step)

    def take(self, step: int) -> None:
        """Puts a save that is written to the end in its place, in that of an earlier one of the same step.

        Raises:
            CheckpointError: Something of somebody else is there.
        """
        written, at = self._unfinished / str(step), self._at(step)
        (written / OWN).write_text("jaxpipe wrote this folder and may delete it\n")
        if self.has(step):
            self.remove(step)
        if at.exists():
            raise CheckpointError(f"{at} is there and is not jaxpipe's; move it away, or name another checkpoint.dir")
        written.rename(at)

    def remove(self, step: int) -> None:
        """Deletes a checkpoint: first its description, so that a half-deleted one is none any more."""
        at, away = self._at(step), self._unfinished / f"{step}{_DELETING}"
        away.mkdir(parents=True, exist_ok=True)
        entries = {entry.name: entry for entry in _entries(at) if _is_part(entry.name)}
        for name in sorted(entries, key=lambda name: (name != META, name == OWN)):
            target = away / name
            if target.exists():  # of a deletion that was cut off
                target.rmtree() if target.is_dir() else target.unlink()
            entries[name].rename(target)
        if at.exists() and not _entries(at):
            at.rmdir()
        away.rmtree()

    def clear_torn(self) -> list[str]:
        """Deletes what saves and deletions that were cut off have left, and names it."""
        entries = _entries(self._unfinished)
        for entry in entries:
            step = entry.name.removesuffix(_DELETING)
            if step != entry.name and _is_step(step):
                self.remove(int(step))
            else:
                entry.rmtree()
        return sorted(entry.name.removesuffix(SAVING).removesuffix(_DELETING) for entry in entries)

    def _at(self, step: int) -> epath.Path:
        return self.path / str(step)


def _entries(folder: epath.Path) -> list[epath.Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _is_step(name: str) -> bool:
    """Whether a name is a step as this program writes it."""
    return name.isdecimal() and name == str(int(name))


def _is_part(name: str) -> bool:
    """Whether a name is one that Orbax or this program gives to a part of a checkpoint."""
    return name in (STATE, META, OWN, _COMMITTED) or name.startswith("_")
