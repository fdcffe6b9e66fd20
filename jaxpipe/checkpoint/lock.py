"""One run at a time in a folder: a lock that names who holds it, and that does not outlive its holder.

The file is locked by the operating system, which unlocks it when the process ends, however that happens: on one machine
that decides, whatever number a later process has. Not every network file system passes such locks on to other machines.
So the holder also touches the file now and then, and on another machine a lock counts until it was left alone for
`LEASE_S` seconds.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxpipe.errors import UnavailableError

LEASE_S, TOUCH_S = 30.0, 5.0
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class Lock:
    """While entered, no other process on this machine, and none on another that sees it, enters.

    Args:
        file: The file; it stays when the lock is left.
        what: What messages call that which is locked, such as ``train.out='runs/a'``.
        note: Is told that a lock of another machine is waited for.
        sleep: Waits that many seconds.
    """

    def __init__(
        self,
        file: Path,
        what: str,
        note: Callable[[str], Any] = lambda text: None,
        sleep: Callable[[float], Any] = time.sleep,
    ):
        self._file, self._what, self._note, self._sleep = file, what, note, sleep
        self._fd = -1
        self._over = threading.Event()

    def check(self) -> None:
        """Looks whether somebody holds it, and writes nothing.

        Raises:
            UnavailableError: Somebody on this machine does.
        """
        with suppress(OSError):
            fd = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _locked(fd) is False:
                    raise self._in_use(_holder(fd))
            finally:
                os.close(fd)

    def __enter__(self) -> "Lock":
        """Takes the lock.

        Raises:
            UnavailableError: Another run has it.
            OSError: The file cannot be written.
        """
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            locked, holder = _locked(self._fd), _holder(self._fd)
            if locked is False:
                raise self._in_use(holder)
            if holder and (holder["host"] != socket.gethostname() or (not locked and _lives(holder["pid"]))):
                self._outwait(holder)
            self._write({"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()})
        except BaseException:
            os.close(self._fd)
            raise
        self._over.clear()
        threading.Thread(target=self._touch, args=(self._fd, self._over), name="lock", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        with suppress(OSError):
            self._write({})
        os.close(self._fd)

    def _outwait(self, holder: dict[str, Any]) -> None:
        """Waits until a lock that this machine cannot judge was left alone for long enough."""
        touched = os.fstat(self._fd).st_mtime
        left = min(LEASE_S, touched + LEASE_S - time.time())  # a clock that goes ahead makes nobody wait longer
        if left > 0.0:
            self._note(f"waiting    {left:.0f} s to see whether {_name(holder)} still has {self._what}")
        while left > 0.0:
            self._sleep(min(1.0, left))
            left -= 1.0
            if os.fstat(self._fd).st_mtime != touched:
                raise self._in_use(holder)

    def _touch(self, fd: int, over: threading.Event) -> None:
        while not over.wait(TOUCH_S):
            with suppress(OSError):
                os.utime(fd)

    def _write(self, facts: dict[str, Any]) -> None:
        text = json.dumps(facts).encode() + b"\n"
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text, 0)

    def _in_use(self, holder: dict[str, Any] | None) -> UnavailableError:
        return UnavailableError(
            f"{self._what} is in use by another run, {_name(holder)}; wait for its end, stop it, or name another folder"
        )


def _locked(fd: int) -> bool | None:
    """Locks a file: whether that went well, None where its file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _holder(fd: int) -> dict[str, Any] | None:
    """Who last took the lock and did not leave it; None where nobody did, or the file was cut off."""
    try:
        facts = json.loads(os.pread(fd, 1000, 0))
    except (OSError, ValueError, RecursionError):
        return None
    good = isinstance(facts, dict) and isinstance(facts.get("host"), str) and isinstance(facts.get("pid"), int)
    return facts if good else None


def _name(holder: dict[str, Any] | None) -> str:
    return f"process {holder['pid']} on {holder['host'][:100]!r}" if holder else "which has not said its name yet"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError, ValueError):
        return False
    except OSError:
        return True
    return True
