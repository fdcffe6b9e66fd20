"""The door to a training run: what is checked and opened before it, and closed and drawn after it."""

from dataclasses import asdict, replace
from typing import Any

import optax

from jaxpipe.errors import ConfigError
from jaxpipe.runtime.gpu import set_gpu_options
from jaxpipe.train.assemble import Assembly, assemble
from jaxpipe.train.config import Config
from jaxpipe.train.fingerprint import fingerprint
from jaxpipe.train.folder import RunFolder
from jaxpipe.train.inherit import keep_tokenizer
from jaxpipe.train.metrics import MetricsLog
from jaxpipe.train.predict import Beside
from jaxpipe.train.processes.crew import Crew
from jaxpipe.train.processes.share import check_crew
from jaxpipe.train.products import draw
from jaxpipe.train.resume import check_start, choose
from jaxpipe.train.signals import StopSignal
from jaxpipe.train.sinks import check_sinks, open_sinks
from jaxpipe.train.store import Store
from jaxpipe.train.summary import summarize
from jaxpipe.train.terminal import Report, Silent
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
        crew: The processes that train together, see `jaxpipe.train.processes`. Process 0 writes and reports, but every
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
    resume = config.checkpoint.resume != "never"
    folder = RunFolder(config.train.out, overwrite=config.train.overwrite, resume=resume, lead=lead)
    gpus = "" if config.mesh.simulate else set_gpu_options(config.gpu)
    store = Store(config.checkpoint.dir or folder.checkpoints)
    start = choose(config, store, folder)
    check_sinks(config)
    run = assemble(config, model)
    config = run.config
    check_crew(crew)
    data = _describe_data(run) if crew or config.checkpoint.enabled or start.candidates else {}
    if crew is not None:
        crew.at_end(report.close)
        crew.agree("the check of the data", data | {"checkpoints found": len(start.candidates)})
    start = check_start(config, start, data)
    folder.make(keep_metrics=start.own)
    if config.train.overwrite and lead:
        store.clear()
    resolved = replace(config, train=replace(config.train, overwrite=False))  # whoever reruns it decides that anew
    folder.write(folder.config, resolved.to_toml())
    folder.write(folder.schedule, run.timetable_svg())
    if config.data.tokenizer and lead:
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


def _describe_data(run: Assembly) -> dict[str, Any]:
    """What the training data are and how they are ordered, see `Meta.data`."""
    digest = fingerprint(run.train.segments)
    return {"digest": digest, "seed": run.train.seed, "seq_len": run.train.seq_len, "windows": run.train.num_windows}
