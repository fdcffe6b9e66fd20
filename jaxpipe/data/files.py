"""What a file holds, by its content: texts, ids of tokens, or something that would be read as either and is none.

A file whose form is not known by its first bytes is what the user says that it is. A header, another width of ids or
the syntax around texts would otherwise be trained on.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpipe.errors import DataError

NUMPY, LLM_C = b"\x93NUMPY", 20240520
"""What `numpy.save` writes first, and the number at the start of llm.c's files of GPT-2's tokens."""
HEADER_BYTES = 1024
"""Of the header in llm.c's files: 256 integers, the number, the version and how many ids follow."""

FOREIGN = {
    b"\x1f\x8b\x08": "compressed with gzip; try gunzip",
    **{b"BZh%d1AY&SY" % level: "compressed with bzip2; try bunzip2" for level in range(1, 10)},
    b"\xfd7zXZ\x00": "compressed with xz; try unxz",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard; try unzstd",
    b"PK\x03\x04": "a zip archive (as .npz, .pt and .docx files are); try what is in it",
    b"PAR1": "a Parquet table; try its texts as JSON lines, under 'text'",
    b"ARROW1": "an Arrow table; try its texts as JSON lines, under 'text'",
    b"%PDF-": "a PDF document; try its text",
    b"\x89HDF": "an HDF5 file; try its arrays with numpy.save",
    b"SQLite format 3\x00": "an SQLite database; try its texts as JSON lines, under 'text'",
    b"\x80\x04\x95": "a pickle; try its ids with numpy.save",
    b"\x80\x05\x95": "a pickle; try its ids with numpy.save",
    b"MMIDIDX\x00\x00": "the index of Megatron-LM's data; try the .bin file beside it",
}
"""First bytes of files that hold neither texts nor ids as they lie, and what to do."""

SAMPLE = 2**20
"""Bytes that are looked at."""
FEWEST = 64
"""Bytes below which a file says too little of itself."""
_PRINTED = bytes(range(32, 127)) + b"\t\n\r"


def texts_of(path: Path) -> list[bytes]:
    """The texts in a file: the whole of it, or those of JSON lines.

    JSON lines, and a JSON list of objects, are texts under ``"text"``.

    Raises:
        DataError: It holds no text, or objects without one.
    """
    blob = path.read_bytes()
    _refuse_foreign(path, blob)
    if blob.startswith(NUMPY):
        raise DataError(f'{path} is an array of NumPy\'s and no text; try data.source="tokens"')
    if blob.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is text in UTF-16; try iconv -f UTF-16 -t UTF-8")
    if b"\x00" in blob[:SAMPLE]:
        raise DataError(f'{path} has bytes of 0 and is no text; try data.source="tokens" if it holds ids of tokens')
    blob = blob.removeprefix(b"\xef\xbb\xbf")
    objects = _objects(blob)
    return [blob] if objects is None else list(_texts(path, objects))


def ids_of(path: Path, dtype: str) -> np.ndarray:
    """The ids of tokens in a file, ``[N]``, mapped and not read.

    An array of NumPy's and a file of llm.c's say themselves what their ids are.

    Args:
        path: The file.
        dtype: Integer type of the ids in a file without a header, little-endian.

    Raises:
        DataError: It is empty, has no whole number of ids, or holds something else.
    """
    with path.open("rb") as file:
        start = file.read(SAMPLE)
    size = path.stat().st_size
    if not size:
        raise DataError(f"{path} is empty; a token file must hold at least train.seq_len+1 ids")
    _refuse_foreign(path, start)
    if start.startswith(NUMPY):
        return _array(path)
    if len(start) >= HEADER_BYTES and int.from_bytes(start[:4], "little") == LLM_C:
        return _of_llm_c(path, start, size)
    kind = np.dtype(dtype).newbyteorder("<")
    if kind.itemsize > 1 and len(start) >= FEWEST and not start.translate(None, _PRINTED):
        raise DataError(f'{path} is text and holds no ids of tokens; try data.source="text"')
    if size % kind.itemsize:
        raise DataError(f"{path} has {size} bytes, no whole number of {kind.itemsize}-byte ids; try another data.dtype")
    return np.memmap(path, dtype=kind, mode="r")


def wider_ids(ids: np.ndarray) -> str:
    """Which dtype ids may really have where every second one is 0; else nothing.

    Args:
        ids: ``[N]``.
    """
    some = ids[: SAMPLE // ids.itemsize]
    if len(some) * some.itemsize < FEWEST or some[1::2].any() or not some.any():
        return ""
    return f"int{16 * ids.itemsize}"


def _refuse_foreign(path: Path, start: bytes) -> None:
    for magic, what in FOREIGN.items():
        if start.startswith(magic):
            raise DataError(f"{path} is {what}")


def _array(path: Path) -> np.ndarray:
    try:
        ids: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read as an array: {error}") from error
    if not np.issubdtype(ids.dtype, np.integer) or not ids.size:
        raise DataError(f"{path} is an array {ids.dtype}{list(ids.shape)} but must hold integers; try ids of tokens")
    return ids.reshape(-1)


def _of_llm_c(path: Path, start: bytes, size: int) -> np.ndarray:
    _, version, count = (int(number) for number in np.frombuffer(start, "<i4", 3))
    if version != 1 or size != HEADER_BYTES + 2 * count:
        raise DataError(
            f"{path} begins like a file of llm.c's but has version {version} and {size} bytes, where version 1 with "
            f"{count} ids has {HEADER_BYTES + 2 * count}"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def _objects(blob: bytes) -> Sequence[Any] | None:
    """The objects of JSON lines or of a JSON list; None where a file is neither.

    A line that is no JSON is an object that has no text.
    """
    if blob.lstrip()[:1] == b"[":
        found = _json(blob)
        return found if isinstance(found, list) and found and all(isinstance(one, dict) for one in found) else None
    if blob.lstrip()[:1] != b"{":
        return None
    lines = [line for line in blob.split(b"\n") if line.strip()]
    if not all(isinstance(_json(line), dict) for line in lines[:2]):
        return None
    return [_json(line) for line in lines]


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _texts(path: Path, objects: Sequence[Any]) -> Iterator[bytes]:
    for number, one in enumerate(objects, 1):
        text = one.get("text") if isinstance(one, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(map(repr, one)) if isinstance(one, dict) else "no JSON object"
            raise DataError(
                f"{path} holds JSON objects but number {number} has no text under 'text' (it has {keys}); "
                'try {"text": …} on every line, or files of plain text'
            )
        yield text.encode(errors="replace")
