"""The training loop: the order of events, and how a run ends.

A run ends in one of three ways: all steps done; a signal came and was noticed between two steps; or an error, of which
a loss that is not finite is the one that no check at the door can foresee. In the first two its state is saved.
"""

import math
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpipe.checkpoint.folder import RunFolder
from jaxpipe.checkpoint.meta import Meta
from jaxpipe.checkpoint.resume import Start, check_data, compare, restore
from jaxpipe.checkpoint.store import Store
from jaxpipe.measure.peak import peak_steps_per_s
from jaxpipe.measure.predict import Beside
from jaxpipe.runtime.layout.state import StateLayout
from jaxpipe.terminal import Report
from jaxpipe.train.assemble import Assembly
from jaxpipe.train.health import Health, NonFiniteError, RollBack
from jaxpipe.train.keeper import Keeper
from jaxpipe.train.optim import adamw, learning_rate
from jaxpipe.train.products import sample_text
from jaxpipe.train.report.metrics import MetricsLog
from jaxpipe.train.signals import StopSignal
from jaxpipe.train.step import init_state, make_eval_step, make_train_step
from jaxpipe.train.track import Track
from jaxpipe.train.watchdog import Heartbeat, Watchdog


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        step: Optimizer steps taken.
        metrics: Metrics of the last step, see `jaxpipe.train.report.metrics`; empty if there was none.
        val_loss: Last validation loss, nats per token; nan if there was none.
        stopped_by: Name of the signal that ended the run early, else None.
        saved: Whether the last state is in a checkpoint; None where checkpoints are off.
        sample: Prompt and continuation, if one was asked for.
        params: The trained weights in the pipeline's layout, on the mesh.
        out: The folder with everything that was written.
    """

    step: int
    metrics: dict[str, float]
    val_loss: float
    stopped_by: str | None
    saved: bool | None
    sample: str | None
    params: Any
    out: Path


class Training:
    """One run from its first to its last step.

    Attributes:
        state: Parameters and optimizer after `step` steps.
        step: Optimizer steps taken.
        row: Place in the data, see `Batches.rows`.
    """

    def __init__(
        self,
        run: Assembly,
        start: Start,
        data: dict[str, Any],
        optimizer: optax.GradientTransformation | None,
        folder: RunFolder,
        store: Store,
        log: MetricsLog,
        report: Report,
        stop: StopSignal,
        watch: Watchdog,
        beside: Beside,
    ):
        config = run.config
        self.beside = beside
        self.run, self.log, self.report, self.stop, self.watch, self.folder = run, log, report, stop, watch, folder
        self.step = self.row = 0
        root = jax.random.key(config.train.seed)
        if start.meta and not start.weights_only:
            root = jax.random.wrap_key_data(jnp.asarray(start.meta.key, jnp.uint32))
        init_key, dropout_key, self.sample_key = jax.random.split(root, 3)
        self._compile(optimizer, init_key, dropout_key)
        self.layout = StateLayout(run.pipe.layout, self.state, self.state.params)
        self.health = Health(config.health)
        tokens = config.train.batch_size * config.train.seq_len
        self.track = Track(
            log,
            report,
            steps=config.train.steps,
            tokens_per_step=tokens,
            log_every=config.train.log_every,
            health=self.health,
            peak_steps_per_s=peak_steps_per_s(run.pipe, run.train[0], config.model.dtype),
            busy_s=run.plan.busy_s if run.plan and run.plan.source == "measured" else None,
        )
        self._waiting: deque[tuple[int, dict, float]] = deque()
        self._in_flight = 0 if run.on_cpu else 1  # [1]
        # [1] An accelerator computes a step while the host reads the numbers of the one before. CPU devices share the
        # host's threads, and two programs with collectives in flight there can starve each other.
        self.keeper = None
        self._suspects: set[int] = set()  # steps that the run went back to and that no good step followed since
        self._sound_at = -1  # step of the state that was last found to have a finite loss
        self._fresh = not start.candidates or start.weights_only
        self._data, self._store = data, store
        if start.candidates:
            self._begin_at(start)
        if config.checkpoint.enabled:
            self._heart = Heartbeat(folder.heartbeat)
            self._heart.beat(self.step, now=True)
            self._key = [int(word) for word in np.asarray(jax.random.key_data(root))]
            self.keeper = Keeper(store, config.checkpoint, self.layout, self._describe, report)
            self.keeper.begin(self.step, start.own, data)

    def go(self) -> Result:
        """Trains, saves and samples."""
        config, keeper = self.run.config, self.keeper
        self.track.restart_clock()
        self.watch.alive("starting")  # compiling may take longer than any step
        while True:
            try:
                if self._fresh and not self.stop.reached(self.step):
                    self._validate()
                    if keeper and config.health.nonfinite == "rollback":
                        keeper.save(self.state, self.step, self.row)
                self._fresh = False
                while self.step < config.train.steps and not self.stop.reached(self.step):
                    self._advance()
                self._settle(0)
                break
            except RollBack as reason:
                self._go_back(str(reason))
        self.watch.alive("saving the last state")
        saved = keeper.finish(self.state, self.step, self.row, tries=3 if self._is_sound() else 0) if keeper else None
        sample = None
        if config.sample.length and not self.stop.reached(self.step):
            sample = sample_text(self.run, self.state, self.sample_key)
            self.folder.write_late(self.folder.sample, sample, self.report.note)
        return Result(
            step=self.step,
            metrics=self.track.last,
            val_loss=self.track.val_loss,
            stopped_by=self.stop.name,
            saved=saved,
            sample=sample,
            params=self.state.params,
            out=self.folder.path,
        )

    def _advance(self):
        """One step, and what is due after it."""
        config = self.run.config.train
        start = time.perf_counter()
        batch = self.run.put(self.run.train, self.row)
        made = time.perf_counter() - start
        self.state, metrics = self.train_step(self.state, batch)
        self.step, self.row = self.step + 1, self.row + config.batch_size
        self._waiting.append((self.step, metrics, made))
        measure = self.step == config.steps or (config.eval_every and self.step % config.eval_every == 0)
        save = self.keeper is not None and self.keeper.due(self.step)
        self._settle(0 if measure or save else self._in_flight)
        if measure:
            self._validate()
        if save and self.keeper and self.step < config.steps:
            self.watch.alive(f"saving step {self.step}")
            if self.health.in_a_row or not self._is_sound():
                self.keeper.postpone()
            else:
                self.keeper.save(self.state, self.step, self.row)
            self.track.restart_clock()

    def _settle(self, in_flight: int):
        """Deals with the numbers of all steps but the last `in_flight`."""
        while len(self._waiting) > in_flight:
            step, metrics, made = self._waiting.popleft()
            self.watch.alive(f"running step {step}")
            self.track.settle(step, metrics, made)
            self.beside.settle()
            self.watch.alive(f"running step {step + 1}")
            if self.keeper:
                self._heart.beat(step)
                if not self.health.in_a_row:
                    self.keeper.good = step - 1  # the state before it
                    self._suspects.clear()
                self.keeper.poll()

    def _validate(self):
        run, config = self.run, self.run.config.train
        count = min(config.eval_batches, max(1, run.val.num_windows // config.batch_size))
        self.watch.alive(f"measuring after step {self.step}")

        def measure() -> float:
            rows = range(0, count * config.batch_size, config.batch_size)
            return float(np.mean([self.eval_step(self.state.params, run.put(run.val, row)) for row in rows]))

        self.track.validate(self.step, measure)
        self._sound_at = self.step

    def _is_sound(self) -> bool:
        """Whether the loss of the state is finite. One that is not is worth no checkpoint, and none is deleted for it.

        Its own loss is what the next step measures; the first batch of the validation data, on which every run begins
        with a finite loss, tells at once.
        """
        if self._sound_at != self.step:
            loss = float(self.eval_step(self.state.params, self.run.put(self.run.val, 0)))
            if not math.isfinite(loss):
                self.report.note(f"warning    the state after step {self.step} is not saved: its loss is {loss}")
                return False
            self._sound_at = self.step
        return True

    def _begin_at(self, start: Start):
        """Takes a checkpoint, or its weights, and says so."""
        meta, path = self._restore(start)
        if start.weights_only:
            self.report.note(f"weights    of step {meta.step} of {path}")
            return
        self.log.write(step=meta.step, event="resumed")
        changes = compare(self.run.config, meta, path)
        if self.row == 0 and meta.row:
            changes.append("data are others; their first batch comes next")
        if meta.data.get("val_digest", self._data.get("val_digest")) != self._data.get("val_digest"):
            changes.append("validation data are others; losses on them are not compared with those before")
        self.report.note("\n           ".join([f"resumed    after step {meta.step}", *changes]))

    def _restore(self, start: Start) -> tuple[Meta, Any]:
        """Replaces the state by a checkpoint's. Returns what that says about itself, and its folder."""
        old, config = self.layout.flatten(self.state), self.run.config
        for leaf, at in zip(old, self.layout.in_params, strict=True):
            if at or not start.weights_only:
                leaf.delete()  # room for what comes

        def check(meta: Meta, where: Any):
            compare(config, meta, where)

        flat, meta, path = restore(start, self.layout, check, self.report)
        self.state = self.layout.unflatten([o if new is None else new for o, new in zip(old, flat, strict=True)])
        if not start.weights_only:
            same = check_data(config, meta, self._data, path)
            self.step, self.row = meta.step, meta.row if same else 0
            self._sound_at = meta.step
            self.track.resume(meta.step, meta.loss, meta.val_loss)
            if start.own:
                self.log.rewind(meta.step)
        return meta, path

    def _go_back(self, reason: str):
        """Takes the newest checkpoint, and goes on with the data after those that were read since."""
        self._waiting.clear()
        bad, row = self.step, self.row
        own = self.keeper.settled() if self.keeper else ()
        if not (self.keeper and own):
            raise NonFiniteError(f"{reason}; there is no checkpoint to go back to")
        own = [step for step in own if step not in self._suspects] or own
        self._restore(Start(tuple(self._store.at(step) for step in own), own=True))
        self._suspects.add(self.step)
        self.keeper.go_back(self.step)
        self.row = row
        self.log.write(step=self.step, event="rolled back", reason=reason)
        skipped = f"data of steps {self.step + 1} to {bad} are skipped"
        self.report.note(f"rolled     back to step {self.step}, {skipped}: {reason}")
        self.track.restart_clock()

    def _describe(self, step: int, row: int, leaves: dict[str, dict[str, Any]]) -> Meta:
        """What a checkpoint of this run says about itself."""
        config, schedule = self.run.config, self.run.pipe.schedule
        return Meta(
            step=step,
            row=row,
            time=time.time(),
            loss=self.track.last.get("loss"),
            val_loss=None if np.isnan(self.track.val_loss) else self.track.val_loss,
            key=self._key,
            data=self._data,
            config={section: _plain(table) for section, table in asdict(config).items()},
            mesh={name: int(size) for name, size in self.run.pipe.mesh.shape.items()},
            schedule=f"{config.schedule.name} V={schedule.repeats} M={schedule.microbatches}",
            leaves=leaves,
        )

    def _compile(self, optimizer, init_key, dropout_key):
        """Draws the weights and compiles the two programs of the run, so that no step's time holds a compilation."""
        run, config, start = self.run, self.run.config, time.perf_counter()
        rate = None if optimizer else learning_rate(config.optim, steps=config.train.steps)
        tx = run.pipe.optimizer(optimizer or adamw(config.optim, steps=config.train.steps))
        batch = run.put(run.train, 0)
        self.state = init_state(run.pipe, tx, init_key, batch)
        key = dropout_key if config.model.dropout else None
        skip = config.health.nonfinite == "skip"
        scale = config.train.loss_scale
        self.train_step = make_train_step(run.pipe, tx, self.state, batch, rate, key, scale, skip)
        self.eval_step = make_eval_step(run.pipe, self.state.params, batch)
        shapes = jax.eval_shape(run.pipe.to_canonical, self.state.params)
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        self.report.note(f"model      {count:,} parameters\ncompiled   in {time.perf_counter() - start:.1f} s")


def _plain(table: dict[str, Any]) -> dict[str, Any]:
    """A section as JSON has it."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in table.items()}
