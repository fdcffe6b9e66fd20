"""A run's folder never takes another run's place unasked."""

import errno

import pytest

from jaxpipe.checkpoint.folder import START, RunFolder
from jaxpipe.cli.main import exit_code
from jaxpipe.errors import ConfigError, UnavailableError


def test_a_folder_that_holds_something_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("precious")
    with pytest.raises(ConfigError, match=r"already holds a run; .*delete .*train\.overwrite=true.*another train\.out"):
        RunFolder(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "precious"


LEFT = {
    "nothing": (),
    "the mark": (".jaxpipe/",),
    "the config": ("config.toml",),
    "all but numbers": ("config.toml", "schedule.svg", ".jaxpipe/"),
}
"""What a run has left that was killed before its first number; no mark by an earlier version."""


@pytest.mark.parametrize("left", LEFT.values(), ids=LEFT)
@pytest.mark.parametrize(("resume", "saves"), [(True, True), (True, False), (False, True)])
def test_a_run_that_was_killed_before_its_first_number_can_be_started_again(tmp_path, left, resume, saves):
    for name in left:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    RunFolder(tmp_path, resume=resume, saves=saves)
    (tmp_path / "metrics.jsonl").write_text("precious")  # which starting over would delete
    if resume and saves and left:
        RunFolder(tmp_path, resume=resume, saves=saves)
    else:
        with pytest.raises(ConfigError, match="already holds a run"):
            RunFolder(tmp_path, resume=resume, saves=saves)


def test_files_of_something_else_are_not_called_a_run(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    for resume in (True, False):
        with pytest.raises(
            ConfigError, match=r"holds files of something else; pass another train\.out=…, or "
        ) as caught:
            RunFolder(tmp_path, resume=resume)
        assert "delete" not in str(caught.value)


def test_starting_over_counts_once_for_each_start(tmp_path, monkeypatch):
    def begun() -> bool:
        return RunFolder(tmp_path, overwrite=True).begun

    def begin():
        folder = RunFolder(tmp_path, overwrite=True)
        with folder.locked(pytest.fail):
            folder.begin("")

    monkeypatch.delenv(START, raising=False)
    assert not begun()
    begin()
    assert not begun()
    monkeypatch.setenv(START, "job 1")
    assert not begun()  # killed while it cleared what was there: it is cleared again
    begin()
    assert begun()
    (tmp_path / "metrics.jsonl").write_text("numbers of this start")
    assert RunFolder(tmp_path, saves=False).begun
    monkeypatch.setenv(START, "job 2")
    assert not begun()


def test_two_runs_do_not_share_a_folder(tmp_path):
    first = RunFolder(tmp_path / "run")
    second = RunFolder(tmp_path / "run")
    with first.locked(pytest.fail):
        with pytest.raises(UnavailableError, match="run' is in use by another run, process"):
            RunFolder(tmp_path / "run", resume=True)
        with pytest.raises(UnavailableError, match="in use"), second.locked(pytest.fail):
            pass
    with second.locked(pytest.fail):
        pass


DISKS = {
    "a run's folder": (True, UnavailableError, "same command", 1),
    "another": (False, ConfigError, "try another", 2),
}


@pytest.mark.parametrize(("known", "error", "way", "code"), DISKS.values(), ids=DISKS)
def test_a_run_s_folder_that_cannot_be_written_now_may_be_written_later(tmp_path, monkeypatch, known, error, way, code):
    if known:
        (tmp_path / "run" / ".jaxpipe").mkdir(parents=True)
    folder = RunFolder(tmp_path / "run", resume=True)

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.mkdir", read_only)
    with pytest.raises(error, match=f"cannot be written: .*Read-only.*{way}") as caught, folder.locked(pytest.fail):
        pass
    assert exit_code(caught.value) == code


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.write(folder.sample, "old")

    def full(self, *_, **__):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(UnavailableError, match="No space left"):
        folder.write(folder.sample, "new")
    notes = []
    folder.write_late(folder.sample, "new", notes.append)
    assert "sample.txt left out" in notes[0]
    assert folder.sample.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["sample.txt"]


def test_overwriting_clears_the_runs_own_files_only_and_only_at_make(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("old")
    (tmp_path / "notes.md").write_text("mine")
    folder = RunFolder(tmp_path, overwrite=True)
    assert (tmp_path / "metrics.jsonl").read_text() == "old"
    folder.make()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.md"]


def test_an_empty_or_missing_folder_is_taken(tmp_path):
    RunFolder(tmp_path).make()
    RunFolder(tmp_path / "a" / "b").make()
    assert (tmp_path / "a" / "b").is_dir()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file' must be a folder, a file is there; try train\.out='.*file-run'"):
        RunFolder(tmp_path / "file", overwrite=True)
    with pytest.raises(ConfigError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "below").make()
