"""Measurements and traces as text and as plain values."""

from statistics import fmean
from typing import Any

from jaxpipe.measure.bench.measure import Row
from jaxpipe.measure.bench.trace import Trace
from jaxpipe.schedule.show.timeline import PHASE_NAMES


def head(cores: int) -> str:
    """What stands above the lines."""
    return (
        f"T1 on one core, the rest on {cores}; limit adds the bubble to T_dev where P <= {cores}\n"
        "seconds are medians, ratios the medians of the rounds' own\n"
        "moved MB: what a tick copies, stashes and fetches, at most\n"
        f"{'schedule':17} {'P':>2} {'V':>2} {'M':>3} {'remat':>5} {'idle':>4} {'T1':>7} {'T_dev':>7} {'limit':>7} "
        f"{'step':>7} {'step/limit':>10} {'T_dev*n/T1':>10} {'T1/step':>7} {'cpu s':>6} {'temp MB':>8} {'plan MB':>8} "
        f"{'moved MB':>8} {'arith':>6} {'compile':>8}"
    )


def line(r: Row) -> str:
    """One case."""
    return (
        f"{r.schedule:17} {r.P:2} {r.V:2} {r.M:3} {r.remat:>5} {r.idle:>4} {r.t1_s:7.3f} {r.t_dev_s:7.3f} "
        f"{r.limit_s:7.3f} {r.step_s:7.3f} {r.ratio_to_limit:10.2f} {r.t_dev_ratio:10.2f} {r.speedup:7.2f} "
        f"{r.cpu_s:6.2f} {r.temp_bytes / 1e6:8.1f} {r.planned_bytes / 1e6:8.1f} "
        f"{r.moved_bytes / 1e6:8.1f} {r.arithmetic:6.2f} {r.compile_s:8.1f}"
    )


def trace_numbers(t: Trace) -> dict[str, Any]:
    """A trace as plain values; times in milliseconds."""
    s = t.schedule
    return {
        "case": str(t.case.workload),
        "schedule": s.name,
        "P": s.devices,
        "V": s.repeats,
        "M": s.microbatches,
        "remat": t.case.remat,
        "idle": t.case.idle,
        "cores": t.cores,
        "shares_cores": t.shares_cores,
        "measured": {"makespan_ms": t.measured.makespan, "bubble": t.measured.bubble},
        "simulated": {"makespan_ms": t.simulated.makespan, "bubble": t.simulated.bubble},
        "phases": {
            phase: {"count": len(spans), "mean_ms": fmean(spans), "min_ms": min(spans), "max_ms": max(spans)}
            for phase, spans in t.spans().items()
        },
    }


def trace_text(t: Trace) -> str:
    """A trace in a few lines."""
    numbers, s = trace_numbers(t), t.schedule
    lines = [
        f"{s.name} P={s.devices} V={s.repeats} M={s.microbatches} remat={t.case.remat} idle={t.case.idle}, "
        f"{t.case.workload}; a debug build, one run",
        f"{'measured':<16} {t.measured.makespan:9.1f} ms  bubble {t.measured.bubble:6.1%}",
        f"{'simulated':<16} {t.simulated.makespan:9.1f} ms  bubble {t.simulated.bubble:6.1%}  lockstep with the mean "
        "times below, by stage",
    ]
    for phase, found in numbers["phases"].items():
        lines.append(
            f"{PHASE_NAMES[phase]:<16} {found['mean_ms']:9.2f} ms  mean of {found['count']}, "
            f"{found['min_ms']:.2f} to {found['max_ms']:.2f}"
        )
    if t.shares_cores:
        lines.append(
            f"devices share cores: {s.devices} on {t.cores}, so lanes slow each other down and one device's bubble is "
            "another's time"
        )
    return "\n".join(lines)
