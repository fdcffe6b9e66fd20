"""Files of data are read for what they are, or refused by name."""

import bz2
import gzip
import json
import lzma
import zipfile
from typing import Any

import numpy as np
import pytest

from jaxpipe.config.sections import DataConfig
from jaxpipe.data.batches import Batches
from jaxpipe.data.corpus import open_corpus
from jaxpipe.data.files import ids_of, texts_of
from jaxpipe.errors import DataError

IDS = np.random.default_rng(0).integers(0, 50_000, 1000)


def corpus(path, source: Any = "tokens", vocab_size: int = 50_257, **options):
    return open_corpus(DataConfig(source=source, train=(str(path),), **options), vocab_size=vocab_size)


def tokens_of(path, **options) -> list[int]:
    """All ids that a corpus of one file has, training and validation."""
    found = corpus(path, **options)
    return [int(i) for part in (found.train, found.val) for segment in part for i in segment.ids]


@pytest.mark.parametrize("dtype", ["uint16", "int32", ">i4", "int64", "uint32"])
@pytest.mark.parametrize("shape", [(1000,), (10, 100)], ids=str)
def test_an_array_of_numpys_says_itself_what_its_ids_are(tmp_path, dtype, shape):
    np.save(tmp_path / "ids", IDS.astype(dtype).reshape(shape))
    assert tokens_of(tmp_path / "ids.npy") == IDS.tolist()
    assert isinstance(ids_of(tmp_path / "ids.npy", "uint16"), np.memmap)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
def test_every_dtype_of_ids_is_read(tmp_path, dtype):
    IDS.astype(f"<{np.dtype(dtype).str[1:]}").tofile(tmp_path / "ids.bin")
    assert tokens_of(tmp_path / "ids.bin", dtype=dtype) == IDS.tolist()


def test_the_header_of_llm_c_is_no_data(tmp_path):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(IDS)
    whole = header.tobytes() + IDS.astype("<u2").tobytes()
    (tmp_path / "train.bin").write_bytes(whole)
    assert tokens_of(tmp_path / "train.bin") == IDS.tolist()
    (tmp_path / "train.bin").write_bytes(whole[:-2])
    with pytest.raises(DataError, match=r"has version 1 and 3022 bytes, where version 1 with 1000 ids has 3024"):
        corpus(tmp_path / "train.bin")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones(8), r"float64\[8\] but must hold integers"),
        (np.array([None]), "cannot be read as an array"),
        (np.ones(0, int), r"int64\[0\]"),
    ],
    ids=["float", "objects", "empty"],
)
def test_arrays_that_hold_no_ids_are_refused(tmp_path, array, message):
    np.save(tmp_path / "ids", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        corpus(tmp_path / "ids.npy")


def test_a_negative_id_is_refused(tmp_path):
    ids = IDS.astype(np.int32)
    ids[500] = -100
    ids.tofile(tmp_path / "ids.bin")
    with pytest.raises(DataError, match=r"ids\.bin: token id -100 must be at least 0; try another data\.dtype"):
        corpus(tmp_path / "ids.bin", dtype="int32")


@pytest.mark.parametrize(("real", "read"), [("int32", "uint16"), ("int64", "uint32"), ("int64", "uint16")])
def test_ids_that_are_wider_than_they_are_read_are_warned_of(tmp_path, real, read):
    IDS.astype(real).tofile(tmp_path / "ids.bin")
    (warning,) = corpus(tmp_path / "ids.bin", dtype=read).warnings(8)
    wider = {"uint16": "int32", "uint32": "int64"}[read]
    assert warning.endswith(
        f'ids.bin: every second id is 0, as where {wider} is read as {read}; try data.dtype="{wider}"'
    )
    assert corpus(tmp_path / "ids.bin", dtype=real).warnings(8) == []


def test_files_that_are_too_short_for_a_row_are_told_of(tmp_path):
    for name, size in (("a", 100), ("b", 5), ("c", 8)):
        IDS[:size].astype(np.uint16).tofile(tmp_path / f"{name}.bin")
    found = corpus(tmp_path / "*.bin", val=(str(tmp_path / "a.bin"),))
    (warning,) = found.warnings(8)
    assert warning.startswith(
        "2 of 3 token files to train on are left out with 13 tokens, being shorter than train.seq_len+1=9: "
    )
    assert "b.bin, …" in warning
    assert Batches(found.train, batch_size=1, seq_len=8, vocab_size=50_257).num_windows == 12
    assert found.warnings(4) == []


@pytest.mark.parametrize("source", ["text", "tokens"])
@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.gz", lambda path: path.write_bytes(gzip.compress(b"text" * 99)), "compressed with gzip; try gunzip"),
        ("a.bz2", lambda path: path.write_bytes(bz2.compress(b"text" * 99)), "compressed with bzip2; try bunzip2"),
        ("a.xz", lambda path: path.write_bytes(lzma.compress(b"text" * 99)), "compressed with xz; try unxz"),
        (
            "a.zst",
            lambda path: path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(96)),
            "compressed with Zstandard; try unzstd",
        ),
        ("a.docx", lambda path: zipfile.ZipFile(path, "w").writestr("a", b"text"), "a zip archive"),
        ("a.parquet", lambda path: path.write_bytes(b"PAR1" + bytes(96)), "a Parquet table; try"),
        ("a.arrow", lambda path: path.write_bytes(b"ARROW1\0\0" + bytes(96)), "an Arrow table; try"),
        ("a.pdf", lambda path: path.write_bytes(b"%PDF-1.7" + bytes(96)), "a PDF document; try its text"),
        ("a.idx", lambda path: path.write_bytes(b"MMIDIDX\0\0" + bytes(99)), "the index of Megatron-LM's data"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("a.") else "",
)
def test_files_that_are_neither_text_nor_ids_are_refused_by_name(tmp_path, source, name, write, message):
    write(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name} is {message}"):
        corpus(tmp_path / name, source=source)


def test_text_that_is_no_utf8_and_ids_that_are_text_are_refused(tmp_path):
    np.save(tmp_path / "ids", IDS)
    (tmp_path / "utf16.txt").write_bytes("text".encode("utf-16"))
    IDS.astype(np.uint16).tofile(tmp_path / "ids.bin")
    (tmp_path / "words.txt").write_text("word " * 100)
    for name, source, message in (
        ("ids.npy", "text", 'an array of NumPy\'s and no text; try data.source="tokens"'),
        ("utf16.txt", "text", "text in UTF-16; try iconv -f UTF-16 -t UTF-8"),
        ("words.txt", "tokens", 'text and holds no ids of tokens; try data.source="text"'),
    ):
        with pytest.raises(DataError) as error:
            corpus(tmp_path / name, source=source)
        assert str(error.value) == f"{tmp_path / name} is {message}"
    (tmp_path / "zeros.txt").write_bytes(b"a\0b\0")
    with pytest.raises(DataError, match="has bytes of 0 and is no text"):
        corpus(tmp_path / "zeros.txt", source="text")


DOCUMENTS = [{"text": "Ein Text."}, {"id": 7, "text": "日本\nzwei Zeilen\n"}, {"text": "end"}]


@pytest.mark.parametrize(
    "form",
    [
        "\n".join(map(json.dumps, DOCUMENTS)),
        "\ufeff\n" + "\n\n".join(map(json.dumps, DOCUMENTS)) + "\n",
        json.dumps(DOCUMENTS, indent=1),
    ],
    ids=["lines", "lines with a mark and gaps", "list"],
)
def test_json_lines_are_the_texts_in_them(tmp_path, form):
    (tmp_path / "a.jsonl").write_text(form, encoding="utf-8")
    assert texts_of(tmp_path / "a.jsonl") == [one["text"].encode() for one in DOCUMENTS]
    found = corpus(tmp_path / "a.jsonl", source="text")
    whole = b"".join(segment.ids.tobytes() for part in (found.train, found.val) for segment in part)
    assert whole == "Ein Text.\n日本\nzwei Zeilen\nend".encode()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"content": "a", "id": 1}', r"number 1 has no text under 'text' \(it has 'content', 'id'\)"),
        ('{"text": "a"}\n{"text": null}', "number 2 has no text"),
        ('{"text": "a"}\n{"text": "b"}\n{"text": "tor', r"number 3 has no text under 'text' \(it has no JSON object\)"),
        ('{"text": "a"}\n{"text": "b"}\n' + "[" * 99_999, "number 3 has no text"),
    ],
    ids=["keys", "null", "torn", "deep"],
)
def test_json_lines_without_text_are_refused(tmp_path, lines, message):
    (tmp_path / "a.jsonl").write_text(lines)
    with pytest.raises(DataError, match=message):
        corpus(tmp_path / "a.jsonl", source="text")


@pytest.mark.parametrize(
    "text",
    ["{a, b} are sets\n", "[1] a reference\n", "[1, 2, 3]", '{\n "pretty": 1\n}', "[" * 9_999],
    ids=lambda t: t[:9],
)
def test_text_that_only_begins_like_json_is_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert texts_of(tmp_path / "a.txt") == [text.encode()]


def test_texts_begin_on_lines_of_their_own(tmp_path):
    for name, text in (("a", "no end"), ("b", ""), ("c", "an end\n"), ("d", "last")):
        (tmp_path / f"{name}.txt").write_text(text)
    found = corpus(tmp_path / "*.txt", source="text", vocab_size=256)
    assert b"".join(s.ids.tobytes() for part in (found.train, found.val) for s in part) == b"no end\nan end\nlast"
