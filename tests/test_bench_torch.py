"""The comparison with torch: jaxpipe's side of it runs without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_torch.py"
SIZES = {"d-model": 16, "num-heads": 2, "num-layers": 2, "seq": 8, "rows": 1, "vocab-size": 32}


def _run(*arguments: str) -> subprocess.CompletedProcess:
    sizes = [text for name, size in SIZES.items() for text in (f"--{name}", str(size))]
    return subprocess.run([sys.executable, str(SCRIPT), *sizes, *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_two_processes_compute_what_one_computes():
    done = _run("--no-torch", "--schedule", "1f1b", "--remat", "all", "--microbatches", "2", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert row["loss"] == pytest.approx(row["t1_loss"], rel=1e-6)
    assert row["step_s"] > 0 and row["t1_s"] > 0
    assert row["torch_step_s"] is None


def test_without_torch_it_says_what_to_install():
    done = _run("--schedule", "1f1b", "--torch-python", "no-such-python")
    assert done.returncode == 2
    assert "pip install torch==2.13.0" in done.stderr
    assert done.stderr.count("\n") == 1
