"""A run's folder never takes another run's place unasked."""

import pytest

from jaxpipe.errors import ConfigError
from jaxpipe.train.folder import RunFolder


def test_a_folder_that_holds_something_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("precious")
    with pytest.raises(ConfigError, match=r"already holds a run; .*delete .*train\.overwrite=true.*another train\.out"):
        RunFolder(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "precious"


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
