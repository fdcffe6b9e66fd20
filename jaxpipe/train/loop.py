"""The door to a training run: what is checked and opened before it, and closed and drawn after it."""

from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import optax

from jaxpipe.checkpoint.folder import RunFolder
from jaxpipe.checkpoint.inherit import keep_tokenizer
from jaxpipe.checkpoint.resume import Start, check_start, choose
from jaxpipe.checkpoint.store import Store
from jaxpipe.config.run import Config
from jaxpipe.data.fingerprint import fingerprint
from jaxpipe.errors import ConfigError, UnavailableError
from jaxpipe.hosts.crew import Crew
from jaxpipe.hosts.share import check_crew
from jaxpipe.measure.predict import Beside
from jaxpipe.runtime.gpu import set_gpu_options
from jaxpipe.terminal import Report, Silent
from jaxpipe.train.assemble import Assembly, assemble
from jaxpipe.train.products import draw
from jaxpipe.train.report.metrics import MetricsLog
from jaxpipe.train.report.sinks import check_sinks, open_sinks
from jaxpipe.train.report.summary import summarize
from jaxpipe.train.signals import StopSignal
from jaxpipe.train.training import Result, Training
from jaxpipe.train.watchdog import Watchdog


def train(
    config: Config,
    *,
    model=None,
    optimizer: optax.GradientTransformation | None = None,
    report: Report | None = None,
    crew: Crew | None = None,
) -> Result:
    """Trains a model and writes metrics, curves, timetable, checkpoints and resolved config into ``config.train.out``.

    Args:
        config: The run. Where its folder holds an earlier part of it, it goes on from there.
        model: A `Model` to train in place of the config's GPT; it sees ``tokens`` and ``targets``, int32 ``[rows, T]``.
        optimizer: Any optax transformation in place of the config's AdamW; it sees logical layers.
        report: Who is told of progress; nobody by default.
        crew: The processes that train together, see `jaxpipe.hosts`. Process 0 writes and reports, but every
            process saves its part of a checkpoint.

    Returns:
        The end of the run. A run that a signal ended returns too, with `Result.stopped_by` set.

    Raises:
        JaxpipeError: Something wrong in the config, the data, the checkpoint or the machine; nothing was written.
        NonFiniteError: The loss or the gradient stopped being finite; what was logged and saved up to there stays.
    """
    if model is not None and config.sample.length:
        raise ConfigError(f"sample.length={config.sample.length} needs the config's own model; try sample.length=0")
    lead = crew is None or crew.lead
    report = report if report and lead else Silent()
    saves, resume = config.checkpoint.enabled, config.checkpoint.resume != "never"
    folder = RunFolder(config.train.out, overwrite=config.train.overwrite, resume=resume, saves=saves, lead=lead)
    if folder.begun:
        config = _going_on(config)
    gpus = "" if config.mesh.simulate else set_gpu_options(config.gpu)
    store = Store(config.checkpoint.dir or folder.checkpoints)
    before = store.steps()
    start = choose(config, store, folder)
    check_sinks(config)
    run = assemble(config, model)
    config = run.config
    check_crew(crew)
    data = _describe_data(run) if crew or saves or start.candidates else {}
    if crew is not None:
        crew.at_end(report.close)
        names = {"digest": "digest of the training data", "val_digest": "digest of the validation data"}
        facts = {names.get(name, name): value for name, value in data.items()}
        crew.agree("the check of the data", facts | {"checkpoints found": len(start.candidates)})
    start = check_start(config, start, data)
    with folder.locked(report.note), store.locked(report.note) if saves and lead else nullcontext():
        if lead and store.steps() != before:
            raise UnavailableError(
                f"{store.path} was saved to by another run while this one started; the same command goes on from there"
            )
        return _run(run, start, data, optimizer, folder, store, report, crew, gpus)


def _run(
    run: Assembly,
    start: Start,
    data: dict[str, Any],
    optimizer: optax.GradientTransformation | None,
    folder: RunFolder,
    store: Store,
    report: Report,
    crew: Crew | None,
    gpus: str,
) -> Result:
    """The run in its folder, which no other run uses now."""
    config, lead = run.config, crew is None or crew.lead
    if config.train.overwrite and lead:
        store.clear()
    folder.make(keep_metrics=start.own)
    resolved = replace(config, train=replace(config.train, overwrite=False))  # whoever reruns it decides that anew
    folder.begin(resolved.to_toml())
    folder.write(folder.schedule, run.timetable_svg())
    if config.data.tokenizer and lead:
        with folder.writing():
            keep_tokenizer(config.data.tokenizer, folder.path)
    report.note("\n".join([run.describe(), *([f"gpus       {gpus}"] if gpus else [])]))
    sinks = open_sinks(config, folder, asdict(resolved)) if lead else []
    beside = Beside(run.plan, report)
    log = MetricsLog(folder.metrics, start.meta.step if start.own and start.meta else None, sinks, report.note)
    summary = None
    try:
        with (
            StopSignal(crew) as stop,
            Watchdog(
                config.watchdog.timeout_s,
                folder.watchdog,
                grace_s=config.checkpoint.grace_s,
                stopped_at=lambda: stop.at,
            ) as watch,
        ):
            training = Training(run, start, data, optimizer, folder, store, log, report, stop, watch, beside)
            result = training.go()
            summary = summarize(training.track, training.keeper, training.health, log, run, training.train_step)
            report.note(summary.text())
            return result
    finally:
        report.close()
        log.close()
        store.close()
        if lead:
            draw(run, log, folder, report, summary)


def _going_on(config: Config) -> Config:
    """The config of a start that is repeated: what it said of starting over has had its effect."""
    resume = "auto" if config.checkpoint.resume == "never" else config.checkpoint.resume
    return replace(
        config,
        train=replace(config.train, overwrite=False),
        checkpoint=replace(config.checkpoint, resume=resume),
    )


def _describe_data(run: Assembly) -> dict[str, Any]:
    """What the data are and how they are ordered, see `Meta.data`."""
    train = run.train
    order = {"seed": train.seed, "seq_len": train.seq_len, "windows": train.num_windows}
    return {"digest": fingerprint(train.segments), **order, "val_digest": fingerprint(run.val.segments)}
