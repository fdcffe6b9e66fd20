"""The training loop: the order of events, and how a run ends.

A run ends in one of three ways: all steps done; a signal came and was noticed between two steps; or an error, of which
a loss that is not finite is the one that no check at the door can foresee.
"""

import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxpipe.errors import ConfigError
from jaxpipe.runtime.gpu import set_gpu_options
from jaxpipe.train.assemble import Assembly, assemble
from jaxpipe.train.config import Config
from jaxpipe.train.folder import RunFolder
from jaxpipe.train.metrics import MetricsLog, plot_loss
from jaxpipe.train.model import gpt_logits
from jaxpipe.train.optim import adamw, learning_rate
from jaxpipe.train.predict import Beside
from jaxpipe.train.processes.crew import Crew
from jaxpipe.train.processes.share import check_crew, here
from jaxpipe.train.sample import continue_tokens
from jaxpipe.train.signals import StopSignal
from jaxpipe.train.step import TrainState, init_state, make_eval_step, make_train_step
from jaxpipe.train.terminal import Report, Silent
from jaxpipe.train.track import Track


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        step: Optimizer steps taken.
        metrics: Metrics of the last step, see `jaxpipe.train.metrics`; empty if there was none.
        val_loss: Last validation loss, nats per token; nan if there was none.
        stopped_by: Name of the signal that ended the run early, else None.
        sample: Prompt and continuation, if one was asked for.
        params: The trained weights in the pipeline's layout, on the mesh.
        out: The folder with everything that was written.
    """

    step: int
    metrics: dict[str, float]
    val_loss: float
    stopped_by: str | None
    sample: str | None
    params: Any
    out: Path


def train(
    config: Config,
    *,
    model=None,
    optimizer: optax.GradientTransformation | None = None,
    report: Report | None = None,
    crew: Crew | None = None,
) -> Result:
    """Trains a model and writes metrics, loss curves, timetable and resolved config into ``config.train.out``.

    Args:
        config: The run.
        model: A `Model` to train in place of the config's GPT; it sees ``tokens`` and ``targets``, int32 ``[rows, T]``.
        optimizer: Any optax transformation in place of the config's AdamW; it sees logical layers.
        report: Who is told of progress; nobody by default.
        crew: The processes that train together, see `jaxpipe.train.processes`. Process 0 writes and reports.

    Returns:
        The end of the run. A run that a signal ended returns too, with `Result.stopped_by` set.

    Raises:
        JaxpipeError: Something wrong in the config, the data or the machine; nothing was written.
        NonFiniteError: The loss or the gradient stopped being finite; what was logged up to there stays.
    """
    if model is not None and config.sample.length:
        raise ConfigError(f"sample.length={config.sample.length} needs the config's own model; try sample.length=0")
    lead = crew is None or crew.lead
    report = report if report and lead else Silent()
    folder = RunFolder(config.train.out, overwrite=config.train.overwrite, lead=lead)
    gpus = "" if config.mesh.simulate else set_gpu_options(config.gpu)
    run = assemble(config, model)
    check_crew(crew)
    if crew is not None:
        crew.at_end(report.close)
        crew.agree("the check of the data", run.facts())
    folder.make()
    resolved = replace(run.config, train=replace(config.train, overwrite=False))  # whoever reruns it decides that anew
    folder.config.write_text(resolved.to_toml(), encoding="utf-8")
    folder.schedule.write_text(run.timetable_svg(), encoding="utf-8")
    report.note("\n".join([run.describe(), *([f"gpus       {gpus}"] if gpus else [])]))
    beside = Beside(run.plan, report)
    log = MetricsLog(folder.metrics)
    try:
        with StopSignal(crew) as stop:
            return _run(run, optimizer, folder, log, report, stop, beside)
    finally:
        report.close()
        log.close()
        if lead:
            _plot(log, folder, report, config.data.unit)


def _run(
    run: Assembly, optimizer, folder: RunFolder, log: MetricsLog, report: Report, stop: StopSignal, beside: Beside
) -> Result:
    config = run.config
    steps = config.train.steps
    init_key, dropout_key, sample_key = jax.random.split(jax.random.key(config.train.seed), 3)
    state, train_step, eval_step = _compile(run, optimizer, report, init_key, dropout_key)

    def validate(step: int):
        count = min(config.train.eval_batches, max(1, run.val.num_windows // config.train.batch_size))
        track.validate(
            step, lambda: float(np.mean([eval_step(state.params, run.put(run.val, i)) for i in range(count)]))
        )

    tokens = config.train.batch_size * config.train.seq_len
    track = Track(log, report, steps=steps, tokens_per_step=tokens, log_every=config.train.log_every)
    if not stop.reached(0):
        validate(0)
    in_flight = 0 if run.on_cpu else 1  # [1]
    waiting: deque[tuple[int, dict]] = deque()
    for step in range(1, steps + 1):
        if stop.reached(step - 1):
            break
        state, metrics = train_step(state, run.put(run.train, step - 1))
        waiting.append((step, metrics))
        due = step == steps or (config.train.eval_every and step % config.train.eval_every == 0)
        while len(waiting) > (0 if due else in_flight):
            track.settle(*waiting.popleft())
            beside.settle()
        if due:
            validate(step)
    while waiting:
        track.settle(*waiting.popleft())
    # [1] An accelerator computes a step while the host reads the numbers of the one before. CPU devices share the
    # host's threads, and two programs with collectives in flight there can starve each other.

    sample = None
    if config.sample.length and not stop.reached(int(state.step)):
        sample = _sample(run, state, sample_key)
        folder.sample.write_text(sample, encoding="utf-8")
    return Result(
        step=int(state.step),
        metrics=track.last,
        val_loss=track.val_loss,
        stopped_by=stop.name,
        sample=sample,
        params=state.params,
        out=folder.path,
    )


def _compile(run: Assembly, optimizer, report: Report, init_key, dropout_key):
    """Draws the weights and compiles the two programs of the run, so that no step's time holds a compilation."""
    config = run.config
    start = time.perf_counter()
    rate = None if optimizer else learning_rate(config.optim, steps=config.train.steps)
    tx = run.pipe.optimizer(optimizer or adamw(config.optim, steps=config.train.steps))
    batch = run.put(run.train, 0)
    state = init_state(run.pipe, tx, init_key, batch)
    key = dropout_key if config.model.dropout else None
    train_step = make_train_step(run.pipe, tx, state, batch, rate, key, config.train.loss_scale)
    eval_step = make_eval_step(run.pipe, state.params, batch)
    shapes = jax.eval_shape(run.pipe.to_canonical, state.params)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    report.note(f"model      {count:,} parameters\ncompiled   in {time.perf_counter() - start:.1f} s")
    return state, train_step, eval_step


def _sample(run: Assembly, state: TrainState, key) -> str:
    """Prompt and continuation; bytes that are no UTF-8, and control characters, become the replacement character."""
    config = run.config
    prompt = config.sample.prompt.encode()
    params = here(run.pipe.to_canonical(state.params), run.pipe.mesh)
    drawn = continue_tokens(
        lambda params, tokens: gpt_logits(config.model, params, tokens),
        params,
        np.frombuffer(prompt, np.uint8),
        length=config.sample.length,
        window=config.train.seq_len,
        temperature=config.sample.temperature,
        key=key,
    )
    text = (prompt + bytes(min(int(token), 255) for token in drawn)).decode(errors="replace")
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def _plot(log: MetricsLog, folder: RunFolder, report: Report, unit: str):
    if not log.lines:
        return
    try:
        plot_loss(log.lines, folder.loss, unit=unit)
    except ImportError:
        report.note("loss.png   left out: matplotlib is missing; try pip install 'jaxpipe[viz]'")
