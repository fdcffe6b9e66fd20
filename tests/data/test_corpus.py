"""Where tokens come from, and every way in which a file can be wrong."""

import sysconfig
from pathlib import Path

import numpy as np
import pytest

from jaxpipe.config.sections import DataConfig
from jaxpipe.data.corpus import open_corpus, stdlib_files
from jaxpipe.errors import DataError


@pytest.fixture
def text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"0123456789" * 10)
    (tmp_path / "b.txt").write_bytes(b"abcdefghij" * 10)
    (tmp_path / "empty.txt").touch()
    return tmp_path


def read(segments) -> bytes:
    return b"".join(bytes(segment.ids) for segment in segments)


def tokens_config(path, **options) -> DataConfig:
    return DataConfig(source="tokens", train=(str(path),), **options)


def test_stdlib_text_leaves_out_tests_and_installed_packages():
    root = Path(sysconfig.get_path("stdlib"))
    files = stdlib_files(root)
    assert root / "json" / "decoder.py" in files
    assert files == sorted(files)
    assert not [
        f for f in files if {"test", "tests", "idle_test", "site-packages"} & set(f.relative_to(root).parts[:-1])
    ]


def test_stdlib_split_is_by_file_without_overlap():
    corpus = open_corpus(DataConfig(), vocab_size=256)
    train, val = read(corpus.train), read(corpus.val)
    root = Path(sysconfig.get_path("stdlib"))
    assert len(train) + len(val) == sum(f.stat().st_size for f in stdlib_files(root))
    assert 0.02 < len(val) / (len(train) + len(val)) < 0.25
    decoder = (root / "json" / "decoder.py").read_bytes()
    assert (decoder in train) != (decoder in val)


def test_stdlib_split_is_the_same_every_time():
    first, second = (open_corpus(DataConfig(), vocab_size=256) for _ in range(2))
    assert read(first.val) == read(second.val)


def test_text_files_join_in_sorted_order(text_files):
    config = DataConfig(source="text", train=(f"{text_files}/*.txt",), val=(f"{text_files}/a.txt",))
    corpus = open_corpus(config, vocab_size=256)
    assert read(corpus.train) == b"0123456789" * 10 + b"\n" + b"abcdefghij" * 10
    assert read(corpus.val) == b"0123456789" * 10


def test_without_validation_files_the_end_is_held_out(text_files):
    config = DataConfig(source="text", train=(f"{text_files}/a.txt",), val_fraction=0.2)
    corpus = open_corpus(config, vocab_size=256)
    assert (read(corpus.train), read(corpus.val)) == (b"0123456789" * 8, b"0123456789" * 2)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_token_files_are_mapped_not_read(tmp_path, dtype):
    ids = np.arange(1000, dtype=dtype)
    ids.tofile(tmp_path / "train.bin")
    (segment,) = open_corpus(
        tokens_config(tmp_path / "train.bin", val=(str(tmp_path / "train.bin"),), dtype=dtype), vocab_size=1000
    ).train
    assert isinstance(segment.ids, np.memmap)
    np.testing.assert_array_equal(segment.ids, ids)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no\*\.txt' matches no file"):
        open_corpus(DataConfig(source="text", train=(f"{tmp_path}/no*.txt",)), vocab_size=256)


def test_empty_text_is_refused(text_files):
    with pytest.raises(DataError, match=r"empty\.txt holds no text"):
        open_corpus(DataConfig(source="text", train=(f"{text_files}/empty.txt",)), vocab_size=256)


def test_empty_token_file_is_refused(text_files):
    with pytest.raises(DataError, match=r"empty\.txt is empty"):
        open_corpus(tokens_config(text_files / "empty.txt"), vocab_size=256)


def test_half_an_id_is_refused(tmp_path):
    (tmp_path / "odd.bin").write_bytes(b"123")
    with pytest.raises(
        DataError, match=r"odd\.bin has 3 bytes, no whole number of 2-byte ids; try another data\.dtype"
    ):
        open_corpus(tokens_config(tmp_path / "odd.bin"), vocab_size=256)


def test_id_out_of_the_vocabulary_is_refused(tmp_path):
    np.array([1, 2, 300, 4], np.uint16).tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match=r"train\.bin: token id 300 must be below model\.vocab_size=300; try .*=301"):
        open_corpus(tokens_config(tmp_path / "train.bin"), vocab_size=300)
    open_corpus(tokens_config(tmp_path / "train.bin"), vocab_size=301)


def test_id_out_of_the_vocabulary_is_refused_in_validation_data_too(tmp_path):
    np.arange(10, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.array([1, 2, 300, 4], np.uint16).tofile(tmp_path / "val.bin")
    with pytest.raises(DataError, match=r"val\.bin: token id 300"):
        open_corpus(tokens_config(tmp_path / "train.bin", val=(str(tmp_path / "val.bin"),)), vocab_size=256)
