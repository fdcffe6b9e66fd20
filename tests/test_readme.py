"""The README's code runs and prints what the README says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", README, flags=re.S)


def test_there_is_code_to_run():
    assert len(BLOCKS) == 3


@pytest.mark.parametrize(("code", "printed"), BLOCKS, ids=["library", "schedule", "generation"])
def test_code_runs_as_written(code, printed, tmp_path):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed


def test_pictures_and_files_that_it_names_exist():
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (Path(__file__).parents[1] / path).exists(), path
