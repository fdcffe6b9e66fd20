"""A run in a few numbers, for the end of its output and for its page."""

import math
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import jax

from jaxpipe.schedule import simulate
from jaxpipe.schedule.costs import relative_costs


@dataclass(frozen=True)
class Summary:
    """What a run came to. What was not measured is None.

    Attributes:
        step: Optimizer steps.
        loss: Of the last step.
        val_loss: The last.
        best_val_loss: The lowest.
        step_time_s: Median over the lines of metrics.
        data_time_s: Of it, what the host spent on making batches; mean.
        tokens_per_s: At that step time.
        mfu: Share of the devices' peak that the model's arithmetic reached at that step time.
        bubble: Share of the devices' time that the schedule leaves idle, simulated.
        measured_bubble: Share of the step time in which a device did none of its work, as long as a measured profile
            says that takes.
        memory_bytes: Of each device, the most it held; on simulated devices, what the compiled step needs.
        saves: Checkpoints begun.
        longest_stall_s: The longest time that a save stopped the loop.
        skipped: Steps left out because their numbers were not finite.
        rollbacks: How often the run went back.
        spikes: Losses that jumped.
    """

    step: int
    loss: float | None
    val_loss: float | None
    best_val_loss: float | None
    step_time_s: float | None
    data_time_s: float | None
    tokens_per_s: float | None
    mfu: float | None
    bubble: float
    measured_bubble: float | None
    memory_bytes: tuple[int, ...]
    saves: int
    longest_stall_s: float | None
    skipped: int
    rollbacks: int
    spikes: int

    def rows(self) -> list[tuple[str, str]]:
        """Names and numbers for people, those that there are."""
        found: list[tuple[str, str | None]] = [
            ("steps", str(self.step)),
            ("loss", _number(self.loss, "{:.4f}")),
            ("validation loss", _number(self.val_loss, "{:.4f}")),
            ("lowest validation loss", _number(self.best_val_loss, "{:.4f}")),
            ("tokens/s", _number(self.tokens_per_s, "{:,.0f}")),
            ("step", _number(self.step_time_s, "{:.4g} s")),
            ("of it making batches", _number(self.data_time_s, "{:.2g} s")),
            ("share of the devices' peak", _number(self.mfu, "{:.1%}")),
            ("bubble, simulated", _number(self.bubble, "{:.1%}")),
            ("bubble, measured", _number(self.measured_bubble, "{:.1%}")),
            ("memory per device", _number(max(self.memory_bytes) if self.memory_bytes else None, "{:,} bytes")),
            ("saves", str(self.saves) if self.saves else None),
            ("longest stall by a save", _number(self.longest_stall_s, "{:.3g} s")),
            ("steps skipped", str(self.skipped) if self.skipped else None),
            ("rollbacks", str(self.rollbacks) if self.rollbacks else None),
            ("loss spikes", str(self.spikes) if self.spikes else None),
        ]
        return [(name, value) for name, value in found if value is not None]

    def text(self) -> str:
        """The rows as lines."""
        return "summary    " + "\n           ".join(f"{name}: {value}" for name, value in self.rows())


def summarize(track: Any, keeper: Any, health: Any, log: Any, run: Any, train_step: Any) -> Summary:
    """The summary of a run.

    Args:
        track: Its `Track`.
        keeper: Its `Keeper`, or None.
        health: Its `Health`.
        log: Its `MetricsLog`.
        run: Its `Assembly`.
        train_step: Its compiled step.
    """
    steps = [line for line in log.lines if "step_time_s" in line]
    measured = [line["val_loss"] for line in log.lines if "val_loss" in line]
    best = min(measured, default=None)
    typical = median(line["step_time_s"] for line in steps) if steps else None
    shares = [line["mfu"] * line["step_time_s"] for line in steps if "mfu" in line]
    bubbles = [line["bubble"] for line in steps if "bubble" in line]
    data = [line["data_time_s"] for line in steps if "data_time_s" in line]
    tokens = run.config.train.batch_size * run.config.train.seq_len
    return Summary(
        step=track.last.get("step", 0),
        loss=track.last.get("loss"),
        val_loss=None if math.isnan(track.val_loss) else track.val_loss,
        best_val_loss=best,
        step_time_s=typical,
        data_time_s=fmean(data) if data else None,
        tokens_per_s=tokens / typical if typical else None,
        mfu=fmean(shares) / typical if shares and typical else None,
        bubble=simulated_bubble(run),
        measured_bubble=median(bubbles) if bubbles else None,
        memory_bytes=memory_bytes(run, train_step),
        saves=len(keeper.stall_s) if keeper else 0,
        longest_stall_s=max(keeper.stall_s, default=None) if keeper else None,
        skipped=health.skipped,
        rollbacks=health.rollbacks,
        spikes=sum(line.get("event") == "spike" for line in log.lines),
    )


def simulated_bubble(run: Any) -> float:
    """Share of the devices' time that the ticks leave idle, if only blocks and their recomputation take time."""
    pipe = run.pipe
    costs = relative_costs(pipe.stages, pipe.remats, pipe.schedule)
    memory = run.config.schedule.memory
    return simulate(pipe.schedule, costs, "lockstep", packing=pipe.table.packing, memory=memory).bubble


def memory_bytes(run: Any, train_step: Any) -> tuple[int, ...]:
    """The most that each of this process's devices held; where devices do not count, what the compiled step needs."""
    devices = [device for device in run.pipe.mesh.devices.flat if device.process_index == jax.process_index()]
    counted = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    if all(counted):
        return tuple(size or 0 for size in counted)
    plan = train_step.memory_analysis()
    if plan is None:
        return ()
    return (plan.argument_size_in_bytes + plan.temp_size_in_bytes,) * len(devices)


def _number(value: Any, form: str) -> str | None:
    return None if value is None else form.format(value)
