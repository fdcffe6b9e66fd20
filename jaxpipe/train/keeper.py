"""When a run is saved, which of its checkpoints stay, and what happens when a save fails.

A save that fails never ends the training: it is told, and tried again. Only the end of the run asks whether the last
state is safe.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxpipe.errors import CheckpointError
from jaxpipe.runtime.checksum import as_text
from jaxpipe.runtime.state import CanonicalLeaf, StateLayout, host_copies
from jaxpipe.train.agree import first_says
from jaxpipe.train.meta import Meta
from jaxpipe.train.quiet import forget_failures
from jaxpipe.train.sections import CheckpointConfig
from jaxpipe.train.store import Leaves, Store
from jaxpipe.train.terminal import Report

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
        stall_s: How long each save stopped the loop.
    """

    def __init__(
        self, store: Store, config: CheckpointConfig, layout: StateLayout, describe: Callable[..., Meta], report: Report
    ):
        self.safe, self.stall_s = -1, []
        self._store, self._config, self._layout, self._describe, self._report = store, config, layout, describe, report
        self._writing: int | None = None
        self._val_loss: dict[int, float] = {}
        self._last_time = time.monotonic()
        self._retry_at, self._late = math.inf, False

    def begin(self, safe: int, made_here: bool) -> None:
        """Looks at what is there, and clears what killed saves left.

        Args:
            safe: Step that the run starts from, -1 for a new run.
            made_here: Whether that step is in this run's own folder.
        """
        self.safe = safe if made_here else -1
        if jax.process_index() == 0:
            try:
                self._store.clear_torn()
            except OSError as error:
                self._report.note(f"warning    {self._store.path} cannot be cleared of torn saves: {error}")
        for step in self._store.steps():
            try:
                loss = self._store.meta(step).val_loss
            except CheckpointError:
                continue
            self._val_loss[step] = math.inf if loss is None else loss
        for chunk in self._layout.chunks if not self._on_host else ():
            chunk.compile()

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

            self._store.start(step, make, lambda: self._prune(step, meta.val_loss))
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

        Returns:
            Whether it is safe.
        """
        for number in range(tries):
            if number:
                time.sleep(min(1.0 * 2**number, RETRY_S))
            self.save(state, step, row)
            self._settle(wait=True)
            if self.safe == step:
                break
        self._store.close()
        return self.safe == step

    def wait(self) -> None:
        """Waits for the save in the background."""
        self._settle(wait=True)

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
        text = " ".join(str(error).split())
        self._report.note(
            f"warning    checkpoint of step {step} was not saved: {text[:300]}; the run goes on and tries again"
        )

    def _prune(self, step: int, val_loss: float | None) -> None:
        """After a save, in the background: deletes what is neither among the newest nor among the best."""
        self._val_loss[step] = math.inf if val_loss is None else val_loss
        if jax.process_index() != 0:
            return
        for step in stale(self._val_loss, self._config.keep, self._config.keep_best):
            try:
                self._store.remove(step)
                del self._val_loss[step]
            except OSError as error:
                self._report.note(f"warning    {self._store.at(step)} was not deleted: {error}")


def stale(val_loss: dict[int, float], keep: int, keep_best: int) -> list[int]:
    """The steps that are neither among the newest nor among the best.

    Example:
        >>> stale({100: 3.0, 200: 2.0, 300: 2.5, 400: 2.6}, keep=1, keep_best=1)
        [100, 300]
    """
    measured = [step for step in val_loss if math.isfinite(val_loss[step])]
    best = sorted(measured, key=lambda step: (val_loss[step], -step))[:keep_best]
    return sorted(set(val_loss) - set(sorted(val_loss)[-keep:]) - set(best))


def _entry(leaf: CanonicalLeaf, sums: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sum": as_text(sums)}


def _off_device(whole: jax.Array) -> jax.Array:
    """An accelerator's array in the memory of its host, so that the device has room for the next."""
    device = next(iter(whole.sharding.device_set))
    if device.platform == "cpu" or "pinned_host" not in {memory.kind for memory in device.addressable_memories()}:
        return whole
    return jax.device_put(whole, whole.sharding.with_memory_kind("pinned_host"))
