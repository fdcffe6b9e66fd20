"""Where tokens come from: the standard library's text, text files, or files of token ids.

A corpus is a training and a validation part, each a list of segments; a segment is one long array of ids with a name
for messages. Text is one segment, since its files may be short; each token file is a segment of its own, mapped and
never read whole. Text becomes tokens at every start, in memory, text by text, with the tokenizer's token for the end of
a text behind each; where it has none, and for bytes, a text begins on a line of its own.
"""

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import numpy as np

from jaxpipe.config.sections import DataConfig
from jaxpipe.data.files import ids_of, texts_of, wider_ids
from jaxpipe.data.tokenizer import Tokenizer, load_tokenizer
from jaxpipe.errors import DataError

_SKIPPED_DIRS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_SCANNED_IDS = 2**28
_CHUNK_IDS = 2**24


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens.

    Attributes:
        name: What messages call it.
        ids: Token ids ``[N]``, an integer type, in memory or mapped from a file.
    """

    name: str
    ids: np.ndarray


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and tokens to measure on."""

    train: tuple[Segment, ...]
    val: tuple[Segment, ...]

    def warnings(self, seq_len: int) -> list[str]:
        """What is allowed and yet hardly meant.

        Args:
            seq_len: Tokens of a row.
        """
        found = []
        segments = {segment.name: segment for segment in (*self.val, *self.train)}
        for name, segment in segments.items():
            if wider := wider_ids(segment.ids):
                kind = segment.ids.dtype.name
                found.append(
                    f'{name}: every second id is 0, as where {wider} is read as {kind}; try data.dtype="{wider}"'
                )
        for part, what in ((self.train, "train on"), (self.val, "validate on")):
            short = [segment for segment in part if len(segment.ids) <= seq_len]
            if short:
                tokens = sum(len(segment.ids) for segment in short)
                found.append(
                    f"{len(short)} of {len(part)} token files to {what} are left out with {tokens:,} tokens, being "
                    f"shorter than train.seq_len+1={seq_len + 1}: {short[0].name}{', …' if short[1:] else ''}; "
                    "try a lower train.seq_len, or one file of them all"
                )
        return found


def open_corpus(config: DataConfig, *, vocab_size: int) -> Corpus:
    """Opens the tokens that the config names and checks ids against the vocabulary.

    Of each file of ids only the first 2^28 are checked here; `jaxpipe.data.batches.Batches` checks every id it hands
    out.

    Args:
        config: Where to look.
        vocab_size: Every id must be below it.

    Raises:
        DataError: No such file, no tokens in it, a size that is no whole number of ids, or an id out of range.
    """
    if config.source == "stdlib":
        corpus = _stdlib(config, Path(sysconfig.get_path("stdlib")))
    elif config.val:
        corpus = Corpus(_open(config, config.train), _open(config, config.val))
    else:
        corpus = _hold_out(_open(config, config.train), config.val_fraction)
    for segment in (*corpus.train, *corpus.val):
        for start in range(0, min(len(segment.ids), _SCANNED_IDS), _CHUNK_IDS):
            check_ids(segment, segment.ids[start : start + _CHUNK_IDS], vocab_size)
    return corpus


def check_ids(segment: Segment, ids: np.ndarray, vocab_size: int):
    """Raises a DataError if `ids`, a part of `segment`, holds an id that the vocabulary does not."""
    if not ids.size or (ids.dtype.kind == "u" and np.iinfo(ids.dtype).max < vocab_size):
        return
    if (smallest := int(ids.min())) < 0:
        raise DataError(f"{segment.name}: token id {smallest} must be at least 0; try another data.dtype")
    largest = int(ids.max())
    if largest >= vocab_size:
        raise DataError(
            f"{segment.name}: token id {largest} must be below model.vocab_size={vocab_size}; "
            f"try model.vocab_size={largest + 1}, or another data.dtype if the ids look wrong"
        )


def stdlib_files(root: Path) -> list[Path]:
    """The Python files below the standard library's folder, sorted; tests and installed packages are left out."""
    files = (path for path in root.rglob("*.py") if not _SKIPPED_DIRS & set(path.relative_to(root).parts[:-1]))
    return sorted(files)


def _stdlib(config: DataConfig, root: Path) -> Corpus:
    """Every file goes to one side by a hash of its contents, so the split is the same wherever Python lives."""
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    for path in stdlib_files(root):
        text = path.read_bytes()
        share = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) / 2**64
        sides[share < config.val_fraction].append(text)
    name = f"standard library text in {root}"
    train, val = (_text(config, name, [(name, text) for text in side]) for side in sides)
    return Corpus((train,), (val,))


def _open(config: DataConfig, patterns: Sequence[str]) -> tuple[Segment, ...]:
    files = [path for pattern in patterns for path in _matches(pattern)]
    if config.source == "text":
        texts = [(str(path), text) for path in files for text in texts_of(path)]
        return (_text(config, ", ".join(patterns), texts),)
    return tuple(Segment(str(path), ids_of(path, config.dtype)) for path in files)


def _matches(pattern: str) -> list[Path]:
    files = sorted(path for path in map(Path, glob(pattern, recursive=True)) if path.is_file())
    if not files:
        raise DataError(f"{pattern!r} matches no file in {Path.cwd()}; a path or glob must name at least one")
    return files


def _text(config: DataConfig, name: str, texts: Sequence[tuple[str, bytes]]) -> Segment:
    """Texts, each with a name for messages, as one segment."""
    if not any(text for _, text in texts):
        raise DataError(f"{name} holds no text; it must hold at least train.seq_len+1 {config.unit}s")
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    if tokenizer is None or tokenizer.eos_id is None:
        texts = list(_on_own_lines(texts))
    if tokenizer is None:
        return Segment(name, np.frombuffer(b"".join(text for _, text in texts), np.uint8))
    return Segment(name, np.concatenate([_encode(tokenizer, *each) for each in texts]))


def _encode(tokenizer: Tokenizer, name: str, text: bytes) -> np.ndarray:
    try:
        ids = tokenizer.pieces(text.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{name} must be UTF-8 for data.tokenizer but byte {error.start} is not") from error
    if tokenizer.eos_id is not None:
        ids.append(tokenizer.eos_id)
    return np.array(ids, np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def _on_own_lines(texts: Sequence[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    """Texts, each with its name, of which all but the last end in a newline; empty ones are left out."""
    texts = [(name, text) for name, text in texts if text]
    for name, text in texts[:-1]:
        yield name, text if text.endswith(b"\n") else text + b"\n"
    yield texts[-1]


def _hold_out(segments: tuple[Segment, ...], fraction: float) -> Corpus:
    """Cuts the last part off every segment."""
    cuts = [len(segment.ids) - max(1, round(len(segment.ids) * fraction)) for segment in segments]
    return Corpus(
        tuple(Segment(segment.name, segment.ids[:cut]) for segment, cut in zip(segments, cuts, strict=True)),
        tuple(Segment(segment.name, segment.ids[cut:]) for segment, cut in zip(segments, cuts, strict=True)),
    )
