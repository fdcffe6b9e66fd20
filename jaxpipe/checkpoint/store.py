"""A folder of checkpoints: which are whole, how one is written, read, checked and removed.

``FOLDER/STEP/`` holds ``state`` (the arrays, written by Orbax, every process its own shards) and ``meta`` (see
`jaxpipe.checkpoint.meta`). A save is written elsewhere and takes that name when all is on disk (see
`jaxpipe.checkpoint.owned`), so one that was killed leaves nothing that looks like a checkpoint; checksums in ``meta``
tell what changed afterwards.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxpipe.checkpoint.lock import Lock
from jaxpipe.checkpoint.meta import Meta, from_json
from jaxpipe.checkpoint.owned import META, OWN, STATE, TEXT, Owned
from jaxpipe.checkpoint.quiet import forget_failures, hush, in_one_line
from jaxpipe.documents import parse_json, read_text
from jaxpipe.errors import CheckpointError, UnavailableError
from jaxpipe.hosts.agree import all_agree
from jaxpipe.runtime.layout.checksum import as_text, checksum
from jaxpipe.runtime.layout.state import CanonicalLeaf

STRAGGLE_S = 3.0
"""The longest time that the end of a run waits for threads of a save that has failed."""

Leaves = Sequence[tuple[CanonicalLeaf, jax.Array]]
"""Canonical leaves and their arrays."""


class Store:
    """One folder of checkpoints.

    Args:
        path: The folder, on a local disk or any that `etils.epath` knows, such as ``gs://…``.
    """

    def __init__(self, path: Any):
        self.path = epath.Path(path)
        self._own = Owned(self.path)
        self._writer: ocp.AsyncCheckpointer | None = None
        self._waiter: threading.Thread | None = None
        self._error: BaseException | None = None
        self._failed = False
        self._others: set[threading.Thread] = set()

    def steps(self) -> list[int]:
        """The steps of the finished checkpoints that jaxpipe wrote, ascending.

        Raises:
            UnavailableError: The folder cannot be read.
        """
        try:
            return self._own.steps()
        except OSError as error:
            raise UnavailableError(f"checkpoints in {self.path} cannot be listed: {error}") from error

    def foreign(self) -> list[str]:
        """Names in the folder that look like checkpoints and are not jaxpipe's."""
        return self._own.foreign()

    @contextmanager
    def locked(self, note: Callable[[str], Any]) -> Iterator[None]:
        """Keeps other runs from saving here while entered, unless it is on no disk, such as ``gs://…``.

        Args:
            note: Is told that a lock of another machine is waited for.

        Raises:
            UnavailableError: Another run saves here.
        """
        with ExitStack() as stack:
            if "://" not in str(self.path):
                lock = Lock(Path(self.path) / OWN / "saves.lock", f"checkpoint.dir={str(self.path)!r}", note)
                with suppress(OSError):  # the disk cannot be written: neither can a save, and that is told
                    stack.enter_context(lock)
            yield

    def at(self, step: int) -> epath.Path:
        """The folder of a checkpoint."""
        return self.path / str(step)

    def start(self, step: int, make: Callable[[], tuple[Leaves, Meta]], then: Callable[[], None]) -> None:
        """Begins a save, and writes it in the background.

        The save before must have been finished. All processes must call it. Where there are several, they make the
        arrays and begin to write before this returns, for they wait for each other.

        Args:
            step: Of the state; a checkpoint of the same step is replaced.
            make: Returns the canonical arrays, and what is said about them.
            then: Is called in the background when all is written.

        Raises:
            Exception: The folder cannot be written; in the background it is raised by `finish`.
        """
        alone = jax.process_count() == 1
        self.clear_torn()
        if not alone:
            self._write(step, *make())

        def run() -> None:
            try:
                if alone:
                    self._write(step, *make())
                self._open().wait_until_finished()
                if jax.process_index() == 0:
                    self._own.take(step)
                then()
            except BaseException as error:
                self._error, self._failed = error, True

        self._waiter = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._waiter.start()

    def _write(self, step: int, leaves: Leaves, meta: Meta) -> None:
        tree: dict[str, Any] = {}
        for leaf, array in leaves:
            below = tree
            for word in leaf.path[:-1]:
                below = below.setdefault(word, {})
            below[leaf.path[-1]] = array
        self._open().save(
            _absolute(self._own.room(step)),
            args=ocp.args.Composite(**{STATE: ocp.args.PyTreeSave(tree), META: ocp.args.JsonSave(meta.to_json())}),
        )

    def finish(self) -> None:
        """Waits for the save in the background, if there is one.

        Raises:
            Exception: It failed; the folder then holds what it held before.
        """
        if self._waiter is not None:
            self._waiter.join()
            self._waiter = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    @property
    def busy(self) -> bool:
        """Whether a save is being written."""
        return self._waiter is not None and self._waiter.is_alive()

    def meta(self, step: int) -> Meta:
        """What a checkpoint says about itself.

        Raises:
            CheckpointError: It is damaged or none of jaxpipe's.
        """
        return read_meta(self.at(step))

    def remove(self, step: int) -> None:
        """Deletes a checkpoint; what somebody else put into its folder stays there."""
        self._own.remove(step)

    def clear(self) -> None:
        """Deletes all checkpoints."""
        for step in self.steps():
            self.remove(step)

    def clear_torn(self) -> list[str]:
        """Deletes what saves and deletions that were cut off have left, and names it. Only process 0 does.

        A disk that cannot be written now is no reason to stop: it is tried again before the next save.
        """
        with suppress(OSError):
            return self._own.clear_torn() if jax.process_index() == 0 else []
        return []

    def _open(self) -> ocp.AsyncCheckpointer:
        if self._writer is None:
            hush()
            self._others = {thread for thread in threading.enumerate() if thread is not self._waiter}
            # Folders are made at once: where that fails in the background, Orbax's threads wait 20 minutes for them and
            # keep the process from ending.
            at_once = ocp.options.AsyncOptions(create_directories_asynchronously=False)
            handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(async_options=at_once))
            self._writer = ocp.AsyncCheckpointer(handler, async_options=at_once)
        return self._writer

    def close(self) -> None:
        """Ends the background threads. A save that is still being written is waited for."""
        if self._waiter is not None:
            self._waiter.join()
        if self._writer is not None:
            failed = self._failed
            # What failed is raised again here, and was raised by `finish` before.
            with suppress(Exception) if failed else nullcontext():
                self._writer.close()
            self._writer, self._failed = None, False
            if failed:
                self._outwait_stragglers()
                self.clear_torn()

    def _outwait_stragglers(self) -> None:
        """Waits for threads of Orbax, which go on with a save that has failed and may still make folders."""
        end = time.monotonic() + STRAGGLE_S
        for thread in set(threading.enumerate()) - self._others:
            with suppress(Exception):  # that of the save: Orbax's threads raise it again
                thread.join(max(0.0, end - time.monotonic()))


def read_meta(path: epath.Path) -> Meta:
    """The description of the checkpoint in a folder.

    Raises:
        CheckpointError: There is none, it is damaged, or something else wrote it.
    """
    try:
        text = read_text(path / META / TEXT, CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of jaxpipe; name a run's folder or one of its checkpoints"
        ) from error
    try:
        facts = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: its description is not JSON, it was cut off or is damaged") from error
    meta = from_json(facts, str(path))
    if path.name.isdecimal() and path.name != str(meta.step):
        raise CheckpointError(f"{path} holds step {meta.step}, not {path.name}; rename it to {meta.step}")
    return meta


def check_leaves(path: epath.Path, meta: Meta, leaves: Sequence[CanonicalLeaf]) -> None:
    """Checks that a checkpoint has the leaves that a run needs.

    Raises:
        CheckpointError: One is missing or has another shape or type.
    """
    for leaf in leaves:
        stored = meta.leaves.get(leaf.name)
        if stored is None:
            raise CheckpointError(
                f"{path} has no {leaf.name}: its model or optimizer is another; "
                f"try checkpoint.init_from={path}, which takes weights only"
            )
        if tuple(stored["shape"]) != leaf.shape or stored["dtype"] != str(leaf.dtype):
            raise CheckpointError(
                f"{path}: {leaf.name} is {stored['dtype']}{stored['shape']}, but this model's is "
                f"{leaf.dtype}{list(leaf.shape)}; try the model of the checkpoint, see `jaxpipe checkpoint show {path}`"
            )


def read_leaves(path: epath.Path, leaves: Sequence[CanonicalLeaf]) -> list[jax.Array]:
    """Canonical leaves of a checkpoint, on the mesh, each process reading its own shards.

    Args:
        path: The checkpoint's folder.
        leaves: What to read, and how it shall rest.

    Raises:
        CheckpointError: A leaf cannot be read.
    """
    wrong, arrays = None, []
    try:
        shapes = {leaf.path: leaf.abstract for leaf in leaves}
        check_fits(path, shapes.values())
        arrays = _read(path, shapes)
    except Exception as error:
        wrong = in_one_line(error)
    if not all_agree(wrong is None):
        forget_failures()
        raise CheckpointError(f"{path} cannot be read: {wrong or 'another process failed'}")
    return arrays


def check_sums(path: epath.Path, meta: Meta, leaves: Sequence[CanonicalLeaf], sums: Any) -> None:
    """Checks that leaves are what was saved.

    Args:
        path: The checkpoint's folder.
        meta: Its description.
        leaves: The leaves.
        sums: Their checksums, uint32 ``[leaves, 2]``.

    Raises:
        CheckpointError: One does not match its checksum.
    """
    for leaf, found in zip(leaves, np.asarray(sums), strict=True):
        if as_text(found) != meta.leaves[leaf.name]["sum"]:
            raise CheckpointError(f"{path}: {leaf.name} does not match its checksum, its files were changed or damaged")


def damage(path: epath.Path) -> Iterator[tuple[str, str | None]]:
    """Reads every leaf of a checkpoint on one CPU device and says what is wrong with it, if anything.

    Yields:
        Name of a leaf, and what is wrong, or None.

    Raises:
        CheckpointError: See `read_meta`.
    """
    meta = read_meta(path)
    device = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    failed = False
    for name, stored in meta.leaves.items():
        shape = jax.ShapeDtypeStruct(tuple(stored["shape"]), np.dtype(stored["dtype"]), sharding=device)
        wrong = None
        try:
            check_fits(path, [shape])
            (array,) = _read(path, {tuple(name.split("/")): shape})
            if as_text(checksum(array)) != stored["sum"]:
                wrong = "does not match its checksum"
        except Exception as error:
            wrong, failed = f"cannot be read: {in_one_line(error)}", True
        yield name, wrong
    if failed:
        forget_failures()


def check_fits(path: epath.Path, shapes: Iterable[Any]) -> None:
    """Checks that this process's shards of arrays fit into the memory of its machine, before they are allocated.

    Raises:
        CheckpointError: They do not; a description can name any size, whatever its files hold.
    """
    size = sum(
        math.prod(shape.sharding.shard_shape(shape.shape))
        * np.dtype(shape.dtype).itemsize
        * len(shape.sharding.addressable_devices)
        for shape in shapes
    )
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > have:
        raise CheckpointError(f"{path} describes {size:,} bytes of arrays, but this machine has {have:,}")


def _read(path: epath.Path, shapes: dict[tuple[str, ...], jax.ShapeDtypeStruct]) -> list[jax.Array]:
    tree: dict[str, Any] = {}
    for words, shape in shapes.items():
        below = tree
        for word in words[:-1]:
            below = below.setdefault(word, {})
        below[words[-1]] = shape
    hush()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
        what = ocp.args.PyTreeRestore(item=tree, restore_args=restore_args, partial_restore=True)
        found: Any = reader.restore(_absolute(path) / STATE, args=what)
    arrays = []
    for words in shapes:
        below = found
        for word in words:
            below = below[word]
        arrays.append(below)
    return arrays


def _absolute(path: epath.Path) -> epath.Path:
    """The path as Orbax asks for it."""
    return path if "://" in str(path) else epath.Path(os.path.abspath(path))
