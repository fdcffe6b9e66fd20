"""When a run is saved, which of its checkpoints stay, and what happens when a save fails.

Only checkpoints on the run's own way count: where it went back, because those of later steps are damaged or led
nowhere, these are neither among the newest nor among the best. They stay until the run is past them. And for a state
that may yet turn out to be ruined, whose gradient nobody has seen, no other is deleted.

A save that fails never ends the training: it is told, and tried again. Only the end of the run asks whether the last
state is safe.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxpipe.checkpoint.meta import Meta
from jaxpipe.checkpoint.quiet import forget_failures, in_one_line
from jaxpipe.checkpoint.store import Leaves, Store
from jaxpipe.config.sections import CheckpointConfig
from jaxpipe.errors import CheckpointError
from jaxpipe.hosts.agree import all_agree, first_says
from jaxpipe.runtime.layout.checksum import as_text
from jaxpipe.runtime.layout.state import CanonicalLeaf, StateLayout, host_copies
from jaxpipe.terminal import Report

RETRY_S = 30.0
"""Time after which a failed save is tried again."""
ASK_EVERY = 16
"""Steps between two looks at the clock where several processes must agree on it."""


class Keeper:
    """Saves one run.

    Args:
        store: Takes the checkpoints.
        config: When, and how many stay.
        layout: The two layouts of the state.
        describe: ``(step, row, leaves) -> Meta``.
        report: Is told of saves that fail.

    Attributes:
        safe: Step of the newest state that is on disk; -1 before the first.
        good: Step of the newest state from which a step was good; checkpoints after it replace none before.
        stall_s: How long each save stopped the loop.
    """

    def __init__(
        self, store: Store, config: CheckpointConfig, layout: StateLayout, describe: Callable[..., Meta], report: Report
    ):
        self.safe, self.good, self.stall_s = -1, -1, []
        self._store, self._config, self._layout, self._describe, self._report = store, config, layout, describe, report
        self._writing: int | None = None
        self._val_loss: dict[int, float] = {}
        self._left: set[int] = set()
        self._last_time = time.monotonic()
        self._retry_at, self._late = math.inf, False

    def begin(self, safe: int, made_here: bool, data: dict[str, Any]) -> None:
        """Looks at what is there, and clears what killed saves left.

        Args:
            safe: Step that the run starts from, -1 for a new run.
            made_here: Whether that step is in this run's own folder.
            data: What the run's data are, see `Meta.data`; losses on other validation data are not compared.
        """
        if cleared := self._store.clear_torn():
            self._report.note(f"cleared    what was not written to the end: {', '.join(cleared)}")
        if jax.process_index() == 0 and (foreign := self._store.foreign()):
            self._report.note(
                f"foreign    {self._store.path} holds {_some(foreign)}, which jaxpipe did not write or finish; "
                "nothing of it is touched"
            )
        for step in self._store.steps():
            try:
                meta = self._store.meta(step)
            except CheckpointError:
                self._left.add(step)
                continue
            same = meta.data.get("val_digest", data.get("val_digest")) == data.get("val_digest")
            self._val_loss[step] = math.inf if meta.val_loss is None or not same else meta.val_loss
        self.go_back(safe if made_here else -1)
        for chunk in self._layout.chunks if not self._on_host else ():
            chunk.compile()

    def go_back(self, step: int) -> None:
        """Takes note that the run goes on from an earlier step: later ones count for nothing."""
        self.safe, self.good = step, min(self.good, step)
        later = {other for other in self._val_loss if other > step}
        self._left |= later
        for other in later:
            del self._val_loss[other]

    def settled(self) -> list[int]:
        """Waits for the save in the background. Returns the steps that the run can go back to, the newest first.

        All processes must call it, and get the same.
        """
        self._settle(wait=True)
        all_agree(True)  # process 0 gives a save its name when all have written
        return sorted(set(self._store.steps()) - self._left, reverse=True)

    def due(self, step: int) -> bool:
        """Whether the state after a step shall be saved now; while a save is being written, the next one waits."""
        every, minutes = self._config.every_steps, self._config.every_minutes
        self._late = self._late or bool(every and step % every == 0)
        if self._late and (jax.process_count() > 1 or not self._store.busy):
            self._late = False
            return True
        if jax.process_count() > 1 and step % ASK_EVERY:
            return False
        now = time.monotonic()
        if self._late or (self._store.busy and jax.process_count() == 1):
            return False
        return first_says(bool(minutes and now - self._last_time >= 60 * minutes) or now >= self._retry_at)

    def postpone(self) -> None:
        """The state is not to be saved now; the next one is due."""
        self._late = True

    def save(self, state: Any, step: int, row: int) -> None:
        """Begins to save a state; returns when it may be changed.

        Args:
            state: In the pipeline's layout, on the mesh.
            step: Its optimizer steps.
            row: Its place in the data.
        """
        if self._writing == step:
            return
        start = time.perf_counter()
        self._settle(wait=True)
        if self.safe == step:
            return
        self._last_time, self._retry_at = time.monotonic(), math.inf
        try:
            meta, take = self._describe(step, row, {}), self._taken(state)

            def make() -> tuple[Leaves, Meta]:
                wholes, sums = take()
                entries = {leaf.name: _entry(leaf, own) for leaf, own in zip(self._layout.leaves, sums, strict=True)}
                return list(zip(self._layout.leaves, wholes, strict=True)), replace(meta, leaves=entries)

            self._store.start(step, make, lambda: self._saved(step, meta.val_loss))
            self._writing = step
        except Exception as error:
            self._failed(step, error)
        else:
            self.stall_s.append(time.perf_counter() - start)
            return
        forget_failures()

    def poll(self) -> None:
        """Looks whether the save in the background has ended, without waiting for it."""
        self._settle(wait=False)

    def finish(self, state: Any, step: int, row: int, tries: int = 3) -> bool:
        """Saves the last state, waiting for the disk, and again where that fails.

        Args:
            state: See `save`.
            step: Likewise.
            row: Likewise.
            tries: How often at most; 0 only waits for the save before.

        Returns:
            Whether it is safe.
        """
        self._settle(wait=True)
        for number in range(tries):
            if number:
                time.sleep(min(1.0 * 2**number, RETRY_S))
            self.save(state, step, row)
            self._settle(wait=True)
            if self.safe == step:
                self.good = step
                self._prune()
                break
        self._store.close()
        return self.safe == step

    def _taken(self, state: Any) -> Callable[[], tuple[list[jax.Array], list]]:
        """What returns the canonical leaves, in the memory of their hosts, and their checksums. The state may change.

        Where the devices are the host's own CPU, a copy is all that is made at once: the rest would stop the loop for
        longer. Accelerators make the rest faster than they copy.
        """
        flat = self._layout.flatten(state)
        if self._on_host:
            copies = host_copies(flat)
            return lambda: self._layout.from_host(copies)
        moved, sums = [], []
        for chunk in self._layout.chunks:
            wholes, found = chunk.gather(flat)
            moved += jax.block_until_ready([_off_device(whole) for whole in wholes])
            sums += list(np.asarray(found))
        return lambda: (moved, sums)

    @property
    def _on_host(self) -> bool:
        device = next(iter(self._layout.leaves[0].sharding.device_set))
        return device.platform == "cpu" and jax.process_count() == 1

    def _settle(self, *, wait: bool) -> None:
        """Takes note of how the save in the background ended."""
        if self._writing is None or (not wait and self._store.busy):
            return
        step, self._writing = self._writing, None
        try:
            self._store.finish()
        except Exception as error:
            self._failed(step, error)
        else:
            self.safe = step
            return
        forget_failures()

    def _failed(self, step: int, error: Exception) -> None:
        self._retry_at = time.monotonic() + RETRY_S
        self._store.clear_torn()  # its last bytes would be missed on a disk that is full
        text = in_one_line(error, most=300)
        self._report.note(
            f"warning    checkpoint of step {step} was not saved: {text}; the run goes on and tries again"
        )

    def _saved(self, step: int, val_loss: float | None) -> None:
        """After a save, in the background."""
        self._val_loss[step] = math.inf if val_loss is None else val_loss
        self._left.discard(step)
        self._prune(sorted(left for left in self._left if left < step))

    def _prune(self, passed: Sequence[int] = ()) -> None:
        """Deletes what is neither among the newest nor among the best, and what the run has passed by."""
        if jax.process_index() != 0:
            return
        good = {step: loss for step, loss in self._val_loss.items() if step <= self.good}
        for step in [*stale(good, self._config.keep, self._config.keep_best), *passed]:
            try:
                self._store.remove(step)
            except OSError as error:
                self._report.note(f"warning    {self._store.at(step)} was not deleted: {error}")
                continue
            self._val_loss.pop(step, None)
            self._left.discard(step)


def stale(val_loss: dict[int, float], keep: int, keep_best: int) -> list[int]:
    """The steps that are neither among the newest nor among the best.

    Example:
        >>> stale({100: 3.0, 200: 2.0, 300: 2.5, 400: 2.6}, keep=1, keep_best=1)
        [100, 300]
    """
    measured = [step for step in val_loss if math.isfinite(val_loss[step])]
    best = sorted(measured, key=lambda step: (val_loss[step], -step))[:keep_best]
    return sorted(set(val_loss) - set(sorted(val_loss)[-keep:]) - set(best))


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def _entry(leaf: CanonicalLeaf, sums: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sum": as_text(sums)}


def _off_device(whole: jax.Array) -> jax.Array:
    """An accelerator's array in the memory of its host, so that the device has room for the next."""
    device = next(iter(whole.sharding.device_set))
    if device.platform == "cpu" or "pinned_host" not in {memory.kind for memory in device.addressable_memories()}:
        return whole
    return jax.device_put(whole, whole.sharding.with_memory_kind("pinned_host"))
