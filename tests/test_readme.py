"""The README's code runs and prints what the README says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", README, flags=re.S)


def test_there_is_code_to_run():
    assert len(BLOCKS) == 2


@pytest.mark.parametrize(("code", "printed"), BLOCKS, ids=["library", "schedule"])
def test_code_runs_as_written(code, printed, tmp_path):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed


def test_pictures_and_files_that_it_names_exist():
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / path).exists(), path


COMMANDS = [
    line.partition("   #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    for line in block.splitlines()
]
SMALLER = "train.steps=2 train.eval_batches=1 model.num_layers=8 model.d_model=32 model.num_heads=2 train.seq_len=32"
"""What makes a training run of the README take seconds."""


def test_commands_are_known():
    """Those not run below have tests of their own, or need a GPU."""
    named = {" ".join(command.split()[:2]) for command in COMMANDS}
    scripts = {"bash scripts/quickstart.sh", "bash scripts/test.sh"}
    assert named == scripts | {"python -c", "jaxpipe train", "jaxpipe plan", "jaxpipe schedule"}


def test_commands_run_as_written_in_order(tmp_path):
    """In a folder with the configs; training runs are cut short."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for command in COMMANDS:
        if command.startswith("bash ") or "plan.toml" in command.split()[2:3]:
            continue  # the plan is for 8 GPUs
        words = f"{command} {SMALLER}" if command.startswith("jaxpipe train") else command
        words = re.sub(
            r"^(jaxpipe|python) ", lambda m: f"{sys.executable} {'-m jaxpipe ' * (m[1] == 'jaxpipe')}", words
        )
        done = subprocess.run(words, shell=True, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert {"plan.toml", "train.bin", "zb_v.svg", "runs"} <= {path.name for path in tmp_path.iterdir()}


def parts(text: str) -> list:
    """What two languages share: levels of headings, code without its comments, targets of links, sizes of tables."""
    found: list = []
    code = False
    for line in text.splitlines():
        if line.startswith("```"):
            code = not code
            found.append(line)
        elif code:
            found.append(re.split(r"\s+#", line)[0])
        elif line.startswith("#"):
            found.append(len(line.split()[0]))
        else:
            found += [target for target in re.findall(r"\]\(([^)]+)\)", line) if not target.startswith("README")]
            found += [line.count("|")] * line.startswith("|")
    return found


def test_the_chinese_one_has_the_same_parts():
    other = (ROOT / "README.zh.md").read_text()
    assert parts(other) == parts(README)
    assert len(README.splitlines()) <= 150


def test_a_difference_would_be_seen():
    assert parts(README.replace("train.out=runs/mine", "train.out=runs/yours")) != parts(README)
    assert parts(README.replace("## Your own model", "### Your own model")) != parts(README)
