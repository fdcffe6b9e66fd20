"""The truth about one GPU in at most nine minutes: numbers, times and memory, as a table.

    python scripts/gpu_check.py                      # all parts, on the first GPU
    python scripts/gpu_check.py --parts tick,head    # some of them
    python scripts/gpu_check.py --quick              # the same code on the CPU at toy sizes: shows that it runs
    python scripts/gpu_check.py --compile-only       # for an H100 that is not there (extra gpu-aot): shows that it fits

Needs what ``pip install jax flax optax`` brings, and this checkout. Every part is a process of its own with its own
time limit; what it found is printed as a line of JSON and added to ``parts.jsonl`` in the folder of ``--out`` when it
ends, and the table is printed and written to ``table.md`` at the end. docs/gpus.md says what each row means.

Exit codes: 0 all that is asked holds, 1 something does not, failed or found no time, 2 wrong arguments.
"""

import argparse
import difflib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(SCRIPTS), str(SCRIPTS.parent)) if path not in sys.path]

from gpu_parts.report import Row, markdown, text_table  # noqa: E402

FACTS = "facts"
NO_GPU = 3
"""Exit code of a part that found none."""


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        limit_s: The most seconds it may take.
        least_s: With less than this left it is not started.
        module: In the folder `gpu_parts`.
        options: Of its `run`.
        environment: What it needs in its environment on a GPU.
    """

    limit_s: float
    least_s: float
    module: str
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


ONE_OF_FOUR = {"JAX_MOCK_GPU_TOPOLOGY": "1x4x1", "XLA_FLAGS": "--xla_gpu_shard_autotuning=false"}

PARTS = {
    "right": Part(80, 20, "right"),
    "tick": Part(90, 30, "tick", {"repeats": 1}),
    "stops": Part(45, 20, "stops", {"command_buffers": "default"}),
    "head": Part(50, 20, "head"),
    "tick-8": Part(150, 60, "tick", {"repeats": 8}),
    "one_of_four": Part(80, 30, "one_of_four", environment=ONE_OF_FOUR),
    "trace": Part(40, 20, "trace"),
    "generate": Part(110, 40, "generate"),
    "stops-off": Part(35, 20, "stops", {"command_buffers": "off"}),
    "stops-loops": Part(35, 20, "stops", {"command_buffers": "loops"}),
}
"""In the order in which they run: what says most for its time comes first."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts that are asked for."""
    options = _options(arguments)
    if options.child:
        return _child(options)
    until = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "parts.jsonl"
    for path in (log, options.out / "log.txt"):
        path.write_text("")
    facts: dict[str, str] = {}
    rows: list[Row] = []
    for name in options.parts:
        start = time.monotonic()
        found, own, goes_on = _run_part(name, options, until)
        facts, rows = facts or found, rows + own
        line = {"part": name, "seconds": round(time.monotonic() - start, 1), "facts": found}
        line["rows"] = [asdict(row) for row in own]
        print(text := json.dumps(line, ensure_ascii=False), flush=True)
        with log.open("a") as file:
            print(text, file=file)
        (options.out / "table.md").write_text(markdown(facts, rows))
        if not goes_on:
            break
    print("; ".join(f"{name} {value}" for name, value in facts.items()))
    print(text_table(rows))
    return 1 if any(row.held is False for row in rows) else 0


def _run_part(name: str, options: argparse.Namespace, until: float) -> tuple[dict[str, str], list[Row], bool]:
    """What a part says it runs on, its rows, and whether another part may find more."""
    part = PARTS[name]
    left_s = until - time.monotonic()
    if left_s < part.least_s:
        found = f"{max(left_s, 0):.0f} s left of {options.minutes:g} min"
        return {}, [Row(name, "not run", found, "runs", False)], True
    limit_s = left_s if options.quick or options.compile_only else min(part.limit_s, left_s)
    path = options.out / f".{name}.rows"
    path.write_text("")
    modes = [flag for flag in ("--quick", "--compile-only") if getattr(options, flag[2:].replace("-", "_"))]
    command = [sys.executable, __file__, "--child", name, "--rows", str(path), "--limit", str(limit_s), *modes]
    with (options.out / "log.txt").open("a") as log:
        print(f"=== {name}", file=log, flush=True)
        at = log.tell()
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=_environment(part, options), start_new_session=True
        )
        code = None
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also after Ctrl-C
            if code is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    facts, rows = _read(path)
    path.unlink()
    if code is None:
        rows.append(Row(name, "the whole part", f"stopped after {limit_s:.0f} s", "ends", False))
    elif code and code != NO_GPU:
        rows.append(Row(name, "the whole part", _last_words(options.out / "log.txt", at, code), "ends", False))
    return facts, rows, code != NO_GPU


def _environment(part: Part, options: argparse.Namespace) -> dict[str, str]:
    if options.quick or options.compile_only:
        return {**os.environ, "JAX_PLATFORMS": "cpu"}
    flags = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), part.environment.get("XLA_FLAGS"))))
    one = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]}
    return {**os.environ, **part.environment, **one, **({"XLA_FLAGS": flags} if flags else {})}


def _read(path: Path) -> tuple[dict[str, str], list[Row]]:
    facts: dict[str, str] = {}
    rows = []
    for line in path.read_text().splitlines():
        try:
            found = json.loads(line)
        except json.JSONDecodeError:  # stopped while it wrote
            continue
        if FACTS in found:
            facts = found[FACTS]
        else:
            rows.append(Row(**found))
    return facts, rows


def _last_words(log: Path, at: int, code: int) -> str:
    """Why a process ended, as its output says."""
    with log.open("rb") as file:
        file.seek(at)
        lines = file.read().decode(errors="replace").splitlines()
    telling = [line for line in lines if "Error" in line or "error:" in line or "Check failed" in line]
    return f"exit {code}: {(telling or lines or ['no output'])[-1].strip()[:200]}"


def _child(options: argparse.Namespace) -> int:
    """Runs one part in this process."""
    deadline = time.monotonic() + 0.85 * options.limit
    part = PARTS[options.child]
    from gpu_parts.setting import Setting, facts, sees_gpu

    import jaxpipe as jp

    own = Setting(options.child, options.quick, options.compile_only, deadline, options.rows)
    if options.quick:
        jp.simulate_devices(4)
    elif not options.compile_only:
        jp.set_gpu_options(jp.GpuOptions(command_buffers=part.options.get("command_buffers", "default")))
        if not sees_gpu():
            own.row("device", "JAX sees no GPU", "one; or try --quick", False)
            return NO_GPU
    with options.rows.open("a") as file:
        print(json.dumps({FACTS: facts(own)}), file=file, flush=True)
    importlib.import_module(f"gpu_parts.{part.module}").run(own, **part.options)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--quick", action="store_true", help="on the CPU at toy sizes")
    modes.add_argument("--compile-only", action="store_true", help="for an H100 that is not there; nothing runs")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, separated by commas: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu-check"), help="folder for what is found: %(default)s"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="in all: %(default)s")
    for name, kind in (("--child", str), ("--rows", Path), ("--limit", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    for name in options.parts:
        if name not in PARTS:
            near = difflib.get_close_matches(name, PARTS, n=1, cutoff=0.0)[0]
            parser.error(f"--parts has {name!r}, which is not one of {', '.join(PARTS)}; try {near}")
    if not options.minutes > 0:
        parser.error(f"--minutes={options.minutes:g} must be above 0; try 9")
    return options


if __name__ == "__main__":
    sys.exit(main())
