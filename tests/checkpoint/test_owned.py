"""What somebody else put into a folder of checkpoints stays there, whatever is saved, deleted or cut off."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import pytest
from etils import epath

from jaxpipe.checkpoint.meta import Meta
from jaxpipe.checkpoint.owned import OWN, Owned
from jaxpipe.checkpoint.store import Store, damage, read_meta
from jaxpipe.config.sections import CheckpointConfig
from jaxpipe.errors import CheckpointError
from jaxpipe.runtime.layout.checksum import checksum
from jaxpipe.runtime.layout.state import CanonicalLeaf
from jaxpipe.terminal import Silent
from jaxpipe.train.keeper import Keeper

FOREIGN = ("2024/holiday.jpg", "2025/meta/metadata", "1000.orbax-checkpoint-tmp/state/a", "7/state/a", "007/a", "note")
ARRAY = jnp.arange(4.0)


class Notes(Silent):
    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)


class Layout:
    """A state of one array, as `Keeper` asks for it."""

    def __init__(self):
        self.leaves = [CanonicalLeaf(("params", "a"), (), (), ARRAY.shape, ARRAY.dtype, ARRAY.sharding)]
        self.chunks = ()

    def flatten(self, state):
        return [state]

    def from_host(self, copies):
        return [jnp.asarray(copy) for copy in copies], [checksum(ARRAY)]


def described(step, row=0, leaves=None, val_loss=None, **data):
    return Meta(step, row, 0.0, 1.0, val_loss, [0, 1], data, {}, {}, "1f1b", leaves or {})


def keeper_of(path, keep=1, keep_best=0, val_loss=None) -> tuple[Keeper, Notes]:
    notes = Notes()
    losses = val_loss or {}

    def describe(step, row, leaves):
        return described(step, row, leaves, losses.get(step))

    config = CheckpointConfig(keep=keep, keep_best=keep_best)
    return Keeper(Store(path), config, Layout(), describe, notes), notes  # pyright: ignore[reportArgumentType]


def saved(keeper: Keeper, *steps: int):
    for step in steps:
        assert keeper.finish(ARRAY, step, 0)


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in FOREIGN:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'{{"format": "mine", "name": "{name}"}}')
    return tmp_path


def foreign_in(folder: Path) -> list[str]:
    return [name for name in FOREIGN if (folder / name).exists()]


def test_what_others_put_there_is_named_and_stays(folder):
    keeper, notes = keeper_of(folder)
    keeper.begin(-1, False, {})
    (told,) = notes.texts
    assert "foreign" in told and "'2024'" in told and "'1000.orbax-checkpoint-tmp'" in told
    saved(keeper, 999, 1000, 2026)  # Orbax itself would clear its temporary name of step 1000
    store = Store(folder)
    assert store.steps() == [2026]
    assert not [wrong for _, wrong in damage(store.at(2026)) if wrong]
    keeper.save(ARRAY, 2024, 0)
    keeper.settled()
    assert keeper.safe != 2024
    assert "2024 is there and is not jaxpipe's; move it away" in notes.texts[-1]
    store.clear()
    assert store.clear_torn() == []
    assert foreign_in(folder) == list(FOREIGN)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        {name.partition("/")[0] for name in FOREIGN} | {OWN}
    )


def test_what_is_put_into_a_checkpoint_or_linked_stays(folder):
    keeper, _ = keeper_of(folder)
    saved(keeper, 1)
    (folder / "1" / "notes.txt").write_text("mine")
    (folder / "elsewhere").mkdir()
    os.rename(folder / "1", folder / "elsewhere" / "1")
    os.symlink(folder / "elsewhere" / "1", folder / "1")
    store = Store(folder)
    assert store.steps() == []
    assert "1" in store.foreign()
    (folder / "1").unlink()
    os.rename(folder / "elsewhere" / "1", folder / "1")
    assert store.steps() == [1]
    store.remove(1)
    assert [path.name for path in (folder / "1").iterdir()] == ["notes.txt"]


def test_a_checkpoint_of_an_earlier_version_is_known_by_its_description(tmp_path):
    keeper, _ = keeper_of(tmp_path)
    saved(keeper, 3)
    (tmp_path / "3" / OWN).unlink()
    assert Store(tmp_path).steps() == [3]
    assert read_meta(epath.Path(tmp_path / "3")).step == 3


def test_deletions_and_saves_that_were_cut_off_are_ended(tmp_path):
    keeper, _ = keeper_of(tmp_path, keep=3)
    saved(keeper, 3, 4)
    owned = Owned(epath.Path(tmp_path))
    owned.room(5).mkdir()
    (tmp_path / OWN / "unfinished" / "5.orbax-checkpoint-tmp").mkdir()
    away = tmp_path / OWN / "unfinished" / "3.deleting"
    away.mkdir()
    os.rename(tmp_path / "3" / "meta", away / "meta")  # killed here
    assert Store(tmp_path).steps() == [4]
    assert Store(tmp_path).clear_torn() == ["3", "5", "5"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [OWN, "4"]
    assert not list((tmp_path / OWN / "unfinished").iterdir())


def test_a_checkpoint_in_the_folder_of_another_step_is_refused(tmp_path):
    keeper, _ = keeper_of(tmp_path)
    saved(keeper, 193)
    os.rename(tmp_path / "193", tmp_path / "200")
    with pytest.raises(CheckpointError, match=r"200 holds step 193, not 200; rename it to 193"):
        list(damage(Store(tmp_path).at(200)))


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("keep_best", [0, 1])
def test_steps_after_the_one_gone_back_to_count_for_nothing(tmp_path, keep, keep_best):
    losses = {2: 3.0, 4: 2.9, 6: 0.1, 8: 0.2, 9: 2.8}  # those that the run left were the best
    before, _ = keeper_of(tmp_path, keep=9, val_loss=losses)
    saved(before, 2, 4, 6, 8)
    (tmp_path / "8" / "meta" / "metadata").write_text("{")
    keeper, _ = keeper_of(tmp_path, keep, keep_best, losses)
    keeper.begin(4, True, {})
    saved(keeper, 5)
    own = {1: [5], 3: [2, 4, 5]}[keep]
    best = [4] if keep_best and keep == 1 else []
    assert Store(tmp_path).steps() == sorted([*own, *best, 6, 8])
    assert keeper.settled() == sorted([*own, *best], reverse=True)
    saved(keeper, 6)  # takes the place of what was left
    saved(keeper, 9)  # and passes the other
    own = {1: [9], 3: [5, 6, 9]}[keep]
    best = [6] if keep_best else []
    assert Store(tmp_path).steps() == sorted({*own, *best})


def test_a_run_that_goes_back_saves_the_step_again_that_it_left(tmp_path):
    keeper, _ = keeper_of(tmp_path, keep=3)
    saved(keeper, 3, 6)
    (tmp_path / "6" / "state" / "manifest.ocdbt").write_bytes(b"")
    keeper.go_back(3)
    saved(keeper, 6)
    assert not [wrong for _, wrong in damage(Store(tmp_path).at(6)) if wrong]


def test_losses_on_other_validation_data_are_not_compared(tmp_path):
    keeper, _ = keeper_of(tmp_path, keep=2, val_loss={2: 0.1, 4: 3.0})
    saved(keeper, 2, 4)
    later, _ = keeper_of(tmp_path, 1, 1, {6: 5.0})
    later.begin(4, True, {"val_digest": "same as before, which did not say"})
    assert Store(tmp_path).steps() == [2, 4]
    for path in tmp_path.glob("*/meta/metadata"):
        step = int(path.parents[1].name)
        path.write_text(json.dumps(described(step, val_loss=0.1, val_digest="a").to_json()))
    later, _ = keeper_of(tmp_path, 1, 1, {6: 5.0})
    later.begin(4, True, {"val_digest": "b"})
    saved(later, 6)
    assert Store(tmp_path).steps() == [6]


def test_a_save_that_fails_leaves_nothing_on_the_disk(tmp_path, monkeypatch):
    keeper, notes = keeper_of(tmp_path)

    def full(self, step):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Owned, "take", full)  # the last of what can fail: all is written
    keeper.save(ARRAY, 1, 0)
    keeper.settled()
    assert "No space left" in notes.texts[-1]
    assert not list((tmp_path / OWN / "unfinished").iterdir())
