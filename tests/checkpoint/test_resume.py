"""A run that goes on is the run that was not interrupted: bit for bit on its own mesh, to rounding on another."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from jaxpipe.checkpoint.folder import RunFolder
from jaxpipe.checkpoint.meta import _digest
from jaxpipe.checkpoint.resume import Start, check_data, choose, find, restore
from jaxpipe.checkpoint.store import Store, damage, read_meta
from jaxpipe.cli.main import main
from jaxpipe.data.batches import Batches
from jaxpipe.data.corpus import Segment
from jaxpipe.errors import CheckpointError, ConfigError
from jaxpipe.hosts.hub import differences
from jaxpipe.runtime.layout.checksum import as_text
from jaxpipe.runtime.layout.state import StateLayout
from jaxpipe.terminal import Silent
from jaxpipe.train import load, train
from jaxpipe.train.assemble import assemble
from jaxpipe.train.evaluate import evaluate, mean_loss
from jaxpipe.train.optim import adamw
from jaxpipe.train.step import init_state

CONFIG = """
[model]
num_layers = 8
num_heads = 2
d_model = 16
bias = false
dropout = 0.1

[data]
source = "text"
train = ["{folder}/*.txt"]

[mesh]
pipe = 4

[schedule]
repeats = 2
microbatches = 4
scan_blocks = true

[optim]
learning_rate = 1e-2
warmup_steps = 2

[train]
steps = 6
batch_size = 8
seq_len = 16
eval_every = 2
eval_batches = 1
log_every = 1
out = "{folder}/run"

[checkpoint]
every_steps = 3
"""
TEXT = b"".join(b"%d squared is %d.\n" % (i, i * i) for i in range(400))


class Notes(Silent):
    """Remembers what it is told."""

    def __init__(self):
        self.texts: list[str] = []

    def note(self, text):
        self.texts.append(text)

    def __str__(self):
        return "\n".join(self.texts)


def config_in(folder: Path):
    """Makes runs of the config from overrides; data and output are in the folder."""
    (folder / "squares.txt").write_bytes(TEXT)
    (folder / "run.toml").write_text(CONFIG.format(folder=folder))
    return lambda *overrides: load(folder / "run.toml", overrides)


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def curves(out) -> dict[str, list[tuple[int, float]]]:
    return {
        name: [(line["step"], line[name]) for line in lines(out) if name in line]
        for name in ("loss", "val_loss", "grad_norm", "lr")
    }


def state_layout(config):
    """A new state of the config's run and its two layouts."""
    run = assemble(config)
    tx = run.pipe.optimizer(adamw(config.optim, steps=config.train.steps))
    state = init_state(run.pipe, tx, jax.random.key(7), run.train[0])
    return state, StateLayout(run.pipe.layout, state, state.params)


def checksums(config, path) -> dict[str, str]:
    """By name, the checksums of a checkpoint restored to the config's mesh and taken back to the canonical layout."""
    state, layout = state_layout(config)
    flat, _, _ = restore(Start((path,)), layout, lambda *_: None, Silent())
    for old, new in zip(layout.flatten(state), flat, strict=True):
        assert (old.shape, old.dtype, old.sharding) == (new.shape, new.dtype, new.sharding)
    return {
        leaf.name: as_text(sums)
        for chunk in layout.chunks
        for leaf, sums in zip(chunk.leaves, chunk.gather(flat)[1], strict=True)
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run on P=4, V=2 with checkpoints of steps 3 and 6, and the maker of its configs."""
    folder = tmp_path_factory.mktemp("whole")
    config = config_in(folder)
    result = train(config())
    assert result.saved
    assert Store(result.out / "checkpoints").steps() == [3, 6]
    return config, result.out


def test_on_the_same_mesh_the_curves_are_bit_equal(whole, tmp_path):
    config, out = whole
    shutil.copytree(out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "los')  # torn by a crash
    notes = Notes()
    result = train(config(f"train.out={tmp_path}/run"), report=notes)
    assert "resumed    after step 3" in str(notes)
    assert result.step == 6
    assert curves(result.out) == curves(out)
    assert sum(line.get("event") == "resumed" for line in lines(result.out)) == 1
    first, second = (read_meta(find(str(folder))) for folder in (out, result.out))
    assert first.leaves == second.leaves  # every checksum of the last state


MESHES = {
    "P=1": ("mesh.pipe=1", "schedule.repeats=1"),
    "P=8": ("mesh.pipe=8", "schedule.repeats=1", "schedule.microbatches=8"),
    "uneven V": ("mesh.pipe=2", "schedule.name=v_min", "schedule.stages=[1,3,4,0]", "schedule.scan_blocks=false"),
}
"""Meshes that hold the state of a checkpoint of P=4, V=2: one line is one case."""
RUNS = {
    "P=2": ("mesh.pipe=2", "schedule.repeats=1"),
    "data=2 pipe=2 tensor=2": ("mesh.pipe=2", "mesh.data=2", "mesh.tensor=2", "schedule.microbatches=2"),
}
"""Meshes that go on with the run; row groups have 2 rows in all, so that dropout draws the same."""


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_another_mesh_holds_the_same_state(whole, mesh):
    config, out = whole
    path = find(str(out))
    leaves = read_meta(epath.Path(path)).leaves
    assert checksums(config(*mesh), path) == {name: leaf["sum"] for name, leaf in leaves.items()}
    for part in ("params/", "opt_state/"):
        assert {leaf["shape"][0] for name, leaf in leaves.items() if name.startswith(part) and "/blocks/" in name} == {
            8
        }


@pytest.mark.parametrize("mesh", RUNS.values(), ids=RUNS)
def test_on_another_mesh_the_curves_are_equal_to_rounding(whole, tmp_path, mesh):
    config, out = whole
    notes = Notes()
    train(config(*mesh, f"resume={out}/checkpoints/3", f"train.out={tmp_path}/run"), report=notes)
    assert "mesh.pipe was 4, is 2" in str(notes)
    for name, before in curves(out).items():
        after = curves(tmp_path / "run")[name]
        rest = [point for point in before if point[0] > 3]
        assert [step for step, _ in after] == [step for step, _ in rest]
        np.testing.assert_allclose([v for _, v in after], [v for _, v in rest], rtol=2e-5)
    same = config(*mesh, f"resume={out}/checkpoints/3", f"train.out={tmp_path}/run")  # the same command, given again
    store = Store(tmp_path / "run" / "checkpoints")
    assert choose(same, store, RunFolder(tmp_path / "run", resume=True)) == Start((store.at(6),), own=True)


def test_weights_alone_start_a_new_run(whole, tmp_path):
    config, out = whole
    notes = Notes()
    small = ("mesh.pipe=1", "schedule.repeats=1", "schedule.microbatches=1")
    overrides = (*small, f"init_from={out}", f"train.out={tmp_path}/run", "train.steps=1", "checkpoint.enabled=false")
    result = train(config(*overrides), report=notes)
    assert "weights    of step 6" in str(notes)
    assert result.step == 1
    (_, before), *_ = curves(tmp_path / "run")["val_loss"]
    assert before == pytest.approx(curves(out)["val_loss"][-1][1], rel=1e-5)
    assert curves(tmp_path / "run")["lr"][0] == curves(out)["lr"][0]  # the optimizer starts anew


REFUSED = {
    "another model": (
        ["model.d_model=32"],
        CheckpointError,
        r"d_model=32 is another model .* model\.d_model=16",
    ),
    "another order": (["train.seed=5"], CheckpointError, r"train\.seed differs .*: was 0, is 5; .*allow_new_data=true"),
    "start over": (["checkpoint.resume=never"], ConfigError, "already holds a run.*train.overwrite=true"),
    "a file for a folder": (
        ["checkpoint.dir={out}/config.toml"],
        ConfigError,
        r"config\.toml' must be a folder, a file is",
    ),
    "nowhere": (["resume=nowhere"], CheckpointError, "nowhere does not exist; name a run's folder"),
    "the past": (["resume={out}/checkpoints/3"], CheckpointError, r"would go on beside .*/6; .*prune .* --after 3`"),
    "two starts": (["resume=a", "init_from=b"], ConfigError, "name two starts; leave one out"),
}


@pytest.mark.parametrize(("overrides", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_make_another_run_is_refused(whole, overrides, error, message):
    config, out = whole
    before = (out / "config.toml").read_text()
    with pytest.raises(error, match=message):
        train(config(*[text.format(out=out) for text in overrides]))
    assert (out / "config.toml").read_text() == before
    assert Store(out / "checkpoints").steps() == [3, 6]


def test_data_that_changed_are_refused_unless_allowed(whole, tmp_path):
    config, out = whole
    (tmp_path / "other.txt").write_bytes(b"!" + TEXT[1:])
    run = (f"data.train={tmp_path}/other.txt", f"resume={out}", f"train.out={tmp_path}/run")
    with pytest.raises(CheckpointError, match=r"the training data differs from that of .*allow_new_data=true"):
        train(config(*run))
    assert not (tmp_path / "run").exists()
    meta = read_meta(find(str(out)))
    assert check_data(config(), meta, meta.data, out)
    assert not check_data(config("checkpoint.allow_new_data=true"), meta, {**meta.data, "digest": "other"}, out)


def flip(path: Path):
    """Changes one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def lie(path: Path, **facts):
    """Rewrites a description, with a digest that fits."""
    file = path / "meta" / "metadata"
    said = {name: value for name, value in json.loads(file.read_text()).items() if name != "digest"} | facts
    file.write_text(json.dumps({**said, "digest": _digest(said)}))


def resize(path: Path, shape: list):
    """Has a description give its largest leaf another shape."""
    leaves = read_meta(epath.Path(path)).leaves
    name = max(leaves, key=lambda name: np.prod(leaves[name]["shape"]))
    lie(path, leaves=leaves | {name: leaves[name] | {"shape": shape}})


def replace_by_folder(path: Path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "a description nested deep": lambda path: (path / "meta" / "metadata").write_text("[" * 100_000),
    "a number of no bounds": lambda path: (path / "meta" / "metadata").write_text('{"step": 1e999}'),
    "a description of no bounds": lambda path: (path / "meta" / "metadata").write_bytes(b" " * (65 << 20)),
    "a folder for a description": lambda path: replace_by_folder(path / "meta" / "metadata"),
    "a folder for an array": lambda path: replace_by_folder(largest(path / "state")),
    "another random key": lambda path: lie(path, key=[1, 2, 3, 4]),
    "a time that is no date": lambda path: lie(path, time=1e300),
    "a config that is none": lambda path: lie(path, config={"model": [1]}),
    "a leaf of no bounds": lambda path: resize(path, [2**62]),
    "a leaf of another shape": lambda path: resize(path, [2**20, 2**20]),
    "a leaf of no type": lambda path: lie(path, leaves={"params": {"shape": [1], "dtype": "object", "sum": ""}}),
    "a flipped bit": lambda path: flip(largest(path / "state")),
    "a cut file": lambda path: os.truncate(largest(path / "state"), 1000),
    "a missing file": lambda path: largest(path / "state").unlink(),
    "a flipped bit in the description": lambda path: flip(path / "meta" / "metadata"),
    "a cut description": lambda path: (path / "meta" / "metadata").write_text('{"format": "jaxpipe-check'),
    "a cut manifest": lambda path: (path / "state" / "manifest.ocdbt").write_bytes(b""),
}


@pytest.fixture(scope="module")
def one_device(whole):
    """The two layouts of the run's state on one device."""
    return state_layout(whole[0]("mesh.pipe=1", "schedule.repeats=1"))[1]


@pytest.mark.parametrize("harm", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found_and_the_checkpoint_before_is_taken(whole, one_device, tmp_path, harm):
    shutil.copytree(whole[1] / "checkpoints", tmp_path / "checkpoints")
    store = Store(tmp_path / "checkpoints")
    assert not [wrong for _, wrong in damage(store.at(6)) if wrong]
    harm(tmp_path / "checkpoints" / "6")
    with suppress(CheckpointError):  # where it cannot even say what it holds
        assert harm is DAMAGES["another random key"] or [wrong for _, wrong in damage(store.at(6)) if wrong]
    notes = Notes()
    _, meta, _ = restore(Start((store.at(6), store.at(3))), one_device, lambda *_: None, notes)
    assert meta.step == 3
    assert "damaged" in str(notes)
    assert "<bound method" not in str(notes)
    with pytest.raises(CheckpointError, match=r"there is no other; to start over pass train\.overwrite=true"):
        restore(Start((store.at(6),)), one_device, lambda *_: None, notes)


def test_a_checkpoint_is_measured_on_every_window(whole, capsys):
    _, out = whole
    one = ("mesh.pipe=1", "schedule.repeats=1", "schedule.microbatches=1")
    score = evaluate(str(out), [*one, "train.batch_size=6"])
    assert (score.step, score.tokens) == (6, (len(TEXT) - round(0.9 * len(TEXT)) - 1) // 16 * 16)
    assert score.loss == pytest.approx(curves(out)["val_loss"][-1][1], rel=0.02)  # that was of one batch
    assert score.perplexity == pytest.approx(np.exp(score.loss))
    assert score.bits_per_byte == pytest.approx(score.loss / np.log(2))
    assert main(["eval", str(out), *one, "--batches", "1", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["tokens"] == 8 * 16
    assert answer["checkpoint"].endswith("/checkpoints/6")


def test_rows_that_windows_do_not_fill_do_not_count():
    batches = Batches([Segment("digits", np.arange(23, dtype=np.uint8))], batch_size=3, seq_len=4, vocab_size=23)
    seen = []

    def measure(batch):
        kept = batch["targets"][batch["mask"] > 0]
        seen.extend(kept.tolist())
        return float(kept.mean())

    loss, tokens = mean_loss(batches, 2, measure)
    assert (tokens, sorted(seen)) == (20, list(range(1, 21)))
    assert loss == pytest.approx(np.mean(range(1, 21)))


def test_the_commands_list_show_verify_and_prune(whole, tmp_path, capsys):
    shutil.copytree(whole[1] / "checkpoints", tmp_path / "checkpoints")
    path = str(tmp_path)
    assert main(["checkpoint", "ls", path]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "size", "loss", "val", "loss", "saved", "mesh"]
    assert [row.split()[0] for row in rows] == ["3", "6"]
    assert "pipe=4, interleaved_1f1b V=2 M=4" in rows[0]
    assert main(["checkpoint", "show", path]) == 0
    shown = capsys.readouterr().out
    assert "jaxpipe 0.1.0" in shown
    assert "d_model = 16" in shown
    assert main(["checkpoint", "verify", path]) == 0
    assert capsys.readouterr().out.count("whole") == 2
    assert main(["checkpoint", "prune", path, "--keep", "1", "--dry-run"]) == 0
    assert capsys.readouterr().out == "would delete 3; kept 6\n"
    flip(largest(tmp_path / "checkpoints" / "6" / "state"))
    assert main(["checkpoint", "verify", path, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert [bool(found) for found in answer.values()] == [False, True]
    assert main(["checkpoint", "prune", path, "--after", "3"]) == 0
    assert capsys.readouterr().out == "deleted 6; kept 3\n"
    assert Store(tmp_path / "checkpoints").steps() == [3]
    for words, message in ((["prune", path], "needs --keep or --after"), (["ls", "nowhere"], "nowhere does not exist")):
        assert main(["checkpoint", *words]) == 2
        assert message in capsys.readouterr().err


def test_pruning_keeps_what_is_whole(whole, tmp_path, capsys):
    """The newest and the best are read before anything is deleted for them."""
    shutil.copytree(whole[1] / "checkpoints", tmp_path / "checkpoints")
    for harm in (lambda path: flip(largest(path / "state")), lambda path: (path / "meta" / "metadata").write_text("{")):
        harm(tmp_path / "checkpoints" / "6")
        assert main(["checkpoint", "prune", str(tmp_path), "--keep", "1", "--keep-best", "1"]) == 0
        assert capsys.readouterr().out == "deleted nothing; kept 3\ndamaged, neither counted nor deleted: 6\n"
        assert Store(tmp_path / "checkpoints").steps() == [3, 6]


def test_other_validation_data_are_told_to_the_other_processes(whole, tmp_path):
    facts = []

    class Process:
        """As far as the check of the data."""

        lead = True

        def at_end(self, action):
            pass

        def agree(self, name, own):
            facts.append(own)
            raise InterruptedError

    for number, text in enumerate((TEXT, TEXT, TEXT[:-3] + b"4.\n")):
        file = tmp_path / f"{number}.txt"
        file.write_bytes(text)
        run = whole[0](f"data.val={file}", f"train.out={tmp_path}/run")
        with pytest.raises(InterruptedError):
            train(run, crew=Process())  # pyright: ignore[reportArgumentType]
    assert not differences(dict(enumerate(facts[:2])))
    told = differences(dict(enumerate(facts)))
    assert told.startswith("digest of the validation data must be the same in all processes: ")
    assert "training" not in told


def test_the_page_of_a_run_stands_alone(whole):
    _, out = whole
    page = (out / "report.html").read_text()
    assert page.count("<polyline") >= 5
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page
    for words in ("Summary", "Timetable", "Memory", "Config", "bubble, simulated", "d_model = 16"):
        assert words in page
