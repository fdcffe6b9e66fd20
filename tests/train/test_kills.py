"""Kills at random instants of a whole run, from before it compiles to after its last line: what they leave goes on.

The same command is given until it is done, in a folder of checkpoints that holds files of somebody else. It ends bit
for bit where a run ends that nobody killed. As a script, more of them:
``PYTHONPATH=.:tests python tests/train/test_kills.py 200``.
"""

import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
from forked_runs import Runs

from jaxpipe.checkpoint.owned import OWN
from jaxpipe.checkpoint.store import Store

CONFIG = """
[model]
num_layers = 1
num_heads = 1
d_model = 8
bias = false
dropout = 0.1

[data]
source = "text"
train = ["{folder}/*.txt"]

[mesh]
pipe = 1

[schedule]
name = "1f1b"
microbatches = 1

[optim]
learning_rate = 1e-2
warmup_steps = 2

[train]
steps = 8
batch_size = 2
seq_len = 8
eval_every = 4
eval_batches = 1
log_every = 1
out = "{folder}/run"

[sample]
prompt = "the"
length = 3

[checkpoint]
dir = "{folder}/photos"
every_steps = 1
keep = 1
keep_best = 1
"""
FOREIGN = {
    "2024/holiday.jpg": "a beach",
    "5.orbax-checkpoint-tmp/state/array": "another tool's",
    "1000/meta/metadata": '{"format": "another tool\'s"}',
    "notes.txt": "mine",
}
STEPS = 8


def prepared(folder: Path) -> Path:
    """A folder with a config, data and files of somebody else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    (folder / "run.toml").write_text(CONFIG.format(folder=folder))
    for name, text in FOREIGN.items():
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "photos" / name).write_text(text)
    return folder


def end_of(folder: Path) -> dict:
    """All that a run comes to."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    store = Store(folder / "photos")
    meta = store.meta(STEPS)
    return {
        "losses": [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines if "loss" in line],
        "val_losses": [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line],
        "state": meta.leaves,
        "place": (meta.step, meta.row, meta.loss, meta.val_loss, meta.key, meta.data),
        "sample": (folder / "run" / "sample.txt").read_text(),
        "files": sorted(path.name for path in (folder / "run").iterdir()),
        "unfinished": list(store.path.glob(f"{OWN}/unfinished/*")),
        "foreign": {name: (store.path / name).read_text() for name in FOREIGN},
    }


class Kills:
    """Kills runs and compares how they end.

    Args:
        runs: Starts them.
        folder: Takes them.
    """

    def __init__(self, runs: Runs, folder: Path):
        self.runs, self.folder = runs, folder
        whole = prepared(folder / "whole")
        self.took_s = {}
        for cold in (False, False, True):  # the first finds nothing that was compiled before, either
            shutil.rmtree(whole / "run", ignore_errors=True)
            shutil.rmtree(whole / "photos")
            prepared(whole)
            start = time.monotonic()
            kill = {"folder": str(whole), "change": 10**9, "cold": cold}
            code, out = runs.start("train", f"{whole}/run.toml", kill=kill).wait()
            assert code == 0, out
            self.took_s[cold] = time.monotonic() - start
        self.changes = int(out.rpartition("changes ")[2])
        self.end = end_of(whole)
        assert [step for step, *_ in self.end["losses"]] == list(range(1, STEPS + 1))

    def chain(self, number: int, most: int) -> list[str]:
        """One run, killed again and again.

        Args:
            number: Seed of the instants.
            most: Kills in a row, after which the run is left to end.

        Returns:
            The instants.
        """
        draw = random.Random(number)
        folder = prepared(self.folder / str(number))
        instants = []
        for _ in range(draw.randint(1, most)):
            cold = draw.random() < 0.1
            kill = {"folder": str(folder), "cold": cold}
            if draw.random() < 0.6:
                kill |= {
                    "change": draw.randint(1, self.changes),
                    "delay_s": draw.choice([0.0, draw.uniform(0.0, 0.01)]),
                }
            else:
                kill |= {"delay_s": draw.uniform(0.0, self.took_s[cold])}
            code, out = self.runs.start("train", f"{folder}/run.toml", kill=kill).wait()
            assert code in (0, -signal.SIGKILL), out
            assert "damaged" not in out
            instants += [str(kill)] * (code != 0)
        code, out = self.runs.start("train", f"{folder}/run.toml").wait()
        assert code == 0, out
        assert len(Store(folder / "photos").steps()) <= 2
        assert end_of(folder) == self.end, instants
        shutil.rmtree(folder)
        return instants


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_instant_ends_as_if_it_had_not_been(tmp_path):
    with Runs() as runs:
        kills = Kills(runs, tmp_path)
        assert kills.chain(1, most=3)


if __name__ == "__main__":
    with Runs() as runs, tempfile.TemporaryDirectory() as folder:
        kills, done, number = Kills(runs, Path(folder)), 0, 1000
        print(f"a whole run changes files {kills.changes} times and takes {kills.took_s} s (cold: True)", flush=True)
        while done < int(sys.argv[1]):
            done, number = done + len(kills.chain(number, most=12)), number + 1
            print(f"{done} kills, {number - 1000} runs", flush=True)
