"""Idle time of a GPU by cause, from the trace that `jax.profiler` writes. Needs no jax.

A gap is time between two kernels on the stream that computes most. What it waited for is read off what else was going
on then, first match:

    host        a copy to the host: a conditional or a loop whose branch the host reads, and what it then launches
    memory      another copy, or a fill
    collective  a kernel of NCCL
    launch      nothing, for less than LAUNCH_US: from one kernel to the next
    else        nothing, for longer
"""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

LAUNCH_US = 10.0
CAUSES: tuple[str, ...] = ("host", "memory", "collective", "launch", "else")


@dataclass(frozen=True)
class Gaps:
    """Where the time of one trace went, µs.

    Attributes:
        total: From the first kernel's start to the last one's end.
        busy: Of kernels.
        idle: By cause.
        counts: How many gaps, by cause.
    """

    total: float
    busy: float
    idle: dict[str, float]
    counts: dict[str, int]


def read_trace(folder: Path) -> list[dict[str, Any]]:
    """The events of the newest trace below a folder.

    Raises:
        FileNotFoundError: There is none.
    """
    files = sorted(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"no *.trace.json.gz below {folder}")
    with gzip.open(files[-1], "rt") as file:
        return json.load(file)["traceEvents"]


def find_gaps(events: Sequence[dict[str, Any]], on_host: bool = False) -> Gaps:
    """Sums the gaps of a trace.

    Args:
        events: In the form of Chrome's trace viewer. Streams are threads called ``Stream …`` of processes called
            ``/device:GPU…``.
        on_host: Whether threads of the host are streams instead, as on a CPU.

    Raises:
        ValueError: There is no stream with a kernel.
    """
    streams = _streams(events, on_host)
    kernels = {stream: [e for e in own if not _is_copy(e)] for stream, own in streams.items()}
    busiest = max(kernels, key=lambda stream: sum(e["dur"] for e in kernels[stream]), default=None)
    if busiest is None or not kernels[busiest]:
        raise ValueError("the trace has no events of a device")
    spans = _merged([(e["ts"], e["ts"] + e["dur"]) for e in kernels[busiest] if not _is_collective(e)])
    others = [e for own in streams.values() for e in own if _is_copy(e) or _is_collective(e)]
    idle, counts = dict.fromkeys(CAUSES, 0.0), dict.fromkeys(CAUSES, 0)
    for (_, start), (end, _) in pairwise(spans):
        cause = _cause(start, end, others)
        idle[cause] += end - start
        counts[cause] += 1
    busy = sum(end - start for start, end in spans)
    return Gaps(spans[-1][1] - spans[0][0], busy, idle, counts)


def _streams(events: Sequence[dict[str, Any]], on_host: bool) -> dict[tuple, list[dict[str, Any]]]:
    named = {"process_name": {}, "thread_name": {}}
    for e in events:
        if e.get("ph") == "M" and e["name"] in named:
            named[e["name"]][e["pid"], e.get("tid") if e["name"] == "thread_name" else None] = e["args"]["name"]
    timed: dict[tuple, list[dict[str, Any]]] = {}
    for e in events:
        if e.get("ph") == "X" and e.get("dur", 0) > 0:
            timed.setdefault((e["pid"], e["tid"]), []).append(e)

    def is_stream(thread: tuple) -> bool:
        process, name = named["process_name"].get((thread[0], None), ""), named["thread_name"].get(thread, "")
        return name != "python" if on_host else process.startswith("/device:GPU") and name.startswith("Stream")

    return {thread: own for thread, own in timed.items() if is_stream(thread)}


def _is_copy(event: dict[str, Any]) -> bool:
    return event["name"].lower().startswith(("memcpy", "memset"))


def _is_collective(event: dict[str, Any]) -> bool:
    return "nccl" in event["name"].lower()


def _merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans that overlap as one."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def _cause(start: float, end: float, others: list[dict[str, Any]]) -> str:
    here = [e["name"].lower() for e in others if e["ts"] < end and e["ts"] + e["dur"] > start]
    if any("d2h" in name or "dtoh" in name for name in here):
        return "host"
    if any(name.startswith(("memcpy", "memset")) for name in here):
        return "memory"
    if here:
        return "collective"
    return "launch" if end - start < LAUNCH_US else "else"
