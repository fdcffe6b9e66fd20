"""The check of a GPU runs at toy sizes on the CPU, compiles for an H100 that is not there, and outlives what fails."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import h100
import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.append(str(SCRIPTS))

gpu_check: Any = importlib.import_module("gpu_check")
find_gaps = importlib.import_module("gpu_parts.gaps").find_gaps

BLOCKER = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def without(folder: Path, *names: str) -> dict[str, str]:
    """An environment whose Python processes lack some modules."""
    (folder / "sitecustomize.py").write_text(BLOCKER.format(names=set(names)))
    return {**os.environ, "PYTHONPATH": str(folder)}


def read(folder: Path) -> dict[str, list[dict]]:
    """The rows of each part."""
    lines = (folder / "parts.jsonl").read_text().splitlines()
    return {line["part"]: line["rows"] for line in map(json.loads, lines)}


@pytest.mark.slow
def test_every_part_runs_at_toy_sizes_without_what_jax_flax_and_optax_do_not_bring(tmp_path):
    parts = [name for name, part in gpu_check.PARTS.items() if part.options.get("command_buffers") in (None, "default")]
    assert {gpu_check.PARTS[name].module for name in parts} == {part.module for part in gpu_check.PARTS.values()}
    command = [sys.executable, SCRIPTS / "gpu_check.py", "--quick", "--parts", ",".join(parts), "--out", tmp_path]
    done = subprocess.run(command, env=without(tmp_path, "tomli_w", "orbax"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + (tmp_path / "log.txt").read_text()[-3000:]
    rows = read(tmp_path)
    assert list(rows) == parts and all(rows.values())
    assert all(row["held"] is not False for own in rows.values() for row in own)
    assert sum(row["held"] is True for row in rows["right"]) == 5
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("card CPU, toy sizes; date 20") and all(f"| {name} |" in table for name in parts)


@pytest.mark.slow
def test_no_part_but_generation_needs_flax(tmp_path):
    code = (
        "import importlib, jaxpipe as jp; jp.Pipeline, jp.sequential, jp.make_mesh, jp.GpuOptions, jp.VocabHead;"
        "[importlib.import_module(f'gpu_parts.{name}') for name in ('right', 'tick', 'stops', 'head', 'trace')];"
        "importlib.import_module('gpu_parts.one_of_four'); import gpu_parts.generate"
    )
    environment = without(tmp_path, "flax", "rich", "orbax", "tomli_w", "etils")
    environment["PYTHONPATH"] += f":{SCRIPTS}:{SCRIPTS.parent}"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.slow
def test_flax_gets_stand_ins_for_what_jax_lacks():
    code = (
        "from jax.experimental import hijax\n"
        "for name in ('HiPrimitive', 'MutableHiType'):\n"
        "    if hasattr(hijax, name): delattr(hijax, name)\n"
        "from gpu_parts.newer import import_nnx\n"
        "print(import_nnx())\n"
        "import jax.numpy as jnp\n"
        "from flax import nnx\n"
        "print(nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))['kernel'].shape)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    note, shape = done.stdout.splitlines()
    assert note.startswith("flax.nnx with stand-ins for hijax.HiPrimitive and hijax.MutableHiType")
    assert shape == "(2, 3)"


def test_a_part_that_fails_or_takes_too_long_is_a_row_and_the_others_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gpu_check.PARTS, "unknown", gpu_check.Part(60, 0, "unknown"))  # to the process of the part
    monkeypatch.setitem(gpu_check.PARTS, "trace", gpu_check.Part(60, 0, "trace"))
    monkeypatch.setitem(gpu_check.PARTS, "head", gpu_check.Part(60, 61, "head"))
    code = gpu_check.main(["--quick", "--parts", "unknown,trace,head", "--out", str(tmp_path), "--minutes", "0.05"])
    assert code == 1
    rows = {part: own[-1] for part, own in read(tmp_path).items()}
    assert rows["unknown"]["found"].startswith(("exit 1: KeyError: 'unknown'", "stopped after"))
    assert rows["trace"]["found"].startswith("stopped after") or rows["trace"]["what"] == "not run"
    assert rows["head"]["what"] == "not run" and rows["head"]["found"].endswith("s left of 0.05 min")
    assert not any(row["held"] for row in rows.values())
    assert "NO" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "tock"], "--parts has 'tock', which is not one of right, tick, .*; try tick"),
        (["--minutes", "0"], "--minutes=0 must be above 0; try 9"),
        (["--quick", "--compile-only"], "not allowed with argument"),
    ],
)
def test_wrong_arguments_are_told(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(arguments)
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_without_a_gpu_it_says_so_and_stops(tmp_path):
    command = [sys.executable, SCRIPTS / "gpu_check.py", "--parts", "trace,head", "--out", tmp_path]
    done = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 1
    (rows,) = read(tmp_path).values()
    assert [(row["found"], row["held"]) for row in rows] == [("JAX sees no GPU", False)]


def test_gaps_are_summed_by_cause():
    def named(kind, pid, tid, name):
        return {"ph": "M", "pid": pid, "tid": tid, "name": kind, "args": {"name": name}}

    def ran(name, start, end, tid=1, pid=1):
        return {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": start, "dur": end - start}

    events = [
        named("process_name", 1, 0, "/device:GPU:0"),
        named("thread_name", 1, 1, "Stream #14(Compute)"),
        named("thread_name", 1, 2, "Stream #15(MemcpyD2H)"),
        named("thread_name", 1, 3, "Stream #16(Compute)"),
        named("thread_name", 1, 4, "XLA Ops"),
        named("process_name", 2, 0, "/host:CPU"),
        ran("gemm", 0, 100),
        ran("MemcpyD2H", 101, 103, tid=2),  # 100 to 130: the host
        ran("gemm", 130, 200),
        ran("fusion", 190, 210),  # overlaps
        ran("fusion", 212, 300),  # 210 to 212: a launch
        ran("MemcpyD2D", 300, 320),  # 300 to 320: memory
        ran("gemm", 320, 400),
        ran("ncclDevKernel_SendRecv", 390, 450, tid=3),  # 400 to 450: a collective
        ran("gemm", 450, 500),
        ran("gemm", 600, 700),  # 500 to 600: nobody knows
        ran("everything", 0, 700, tid=4),
        ran("python", 0, 900, tid=1, pid=2),
    ]
    gaps = find_gaps(events)
    assert gaps.total == 700 and gaps.busy == 700 - 202
    assert gaps.idle == {"host": 30, "memory": 20, "collective": 50, "launch": 2, "else": 100}
    assert set(gaps.counts.values()) == {1}
    with pytest.raises(ValueError, match="no events of a device"):
        find_gaps([event for event in events if event["pid"] == 2])


@pytest.mark.slow
@pytest.mark.gpu_aot
@h100.MARKS[1]
def test_the_step_of_real_size_compiles_and_fits_an_h100(tmp_path):
    command = [sys.executable, SCRIPTS / "gpu_check.py", "--compile-only", "--parts", "tick", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + (tmp_path / "log.txt").read_text()[-3000:]
    (rows,) = read(tmp_path).values()
    asked = [row["what"] for row in rows if row["held"]]
    assert sum(what.endswith(" compiles") for what in asked) == 4
    assert sum(what.endswith("fused attention") for what in asked) == 2
