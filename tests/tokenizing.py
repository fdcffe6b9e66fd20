"""Small tokenizers of every kind that models come with, made on the spot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from jaxpipe.infer.serving.text import FileTokenizer

TEXT = [
    "the cat sat on the mat, and the dog sat on the log.",
    "a dog's day: the cat isn't here; the dog is there!",
    "日本 and 中国 and naïve café",
] * 3
SPECIAL = ["<pad>", "</s>", "<unk>", "<s>", "<extra_id_0>", "<extra_id_1>"]


def _byte_level() -> Tokenizer:
    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    own.train_from_iterator(TEXT, trainer)
    return own


def _byte_fallback(**options: Any) -> Tokenizer:
    own = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    plain = [text for text in TEXT if text.isascii()]
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    own.train_from_iterator(plain, trainer)
    table = json.loads(own.to_str())
    table["added_tokens"] = [token for token in table["added_tokens"] if not token["content"].startswith("<0x")]
    own = Tokenizer.from_str(json.dumps(table))
    strip = [decoders.Strip(" ", left=1, right=0)]
    own.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *options.get("after", strip)]
    )
    return own


def _unigram() -> Tokenizer:
    own = Tokenizer(models.Unigram())
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    own.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    own.train_from_iterator(TEXT, trainer)
    own.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return own


def _word_piece() -> Tokenizer:
    own = Tokenizer(models.WordPiece(unk_token="<unk>"))
    own.normalizer, own.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    own.decoder = decoders.WordPiece(prefix="##")
    own.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False))
    return own


def _end_of_word() -> Tokenizer:
    own = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    own.pre_tokenizer, own.decoder = pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    own.train_from_iterator(TEXT, trainer)
    return own


def _characters() -> Tokenizer:
    own = Tokenizer(models.BPE(unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    own.decoder = decoders.Fuse()
    own.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=80, special_tokens=SPECIAL, show_progress=False))
    return own


def _words() -> Tokenizer:
    own = Tokenizer(models.WordLevel(unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    own.train_from_iterator(TEXT, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    return own


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": _byte_level,
    "BPE with byte fallback": _byte_fallback,
    "BPE with byte fallback, nothing stripped": lambda: _byte_fallback(after=[]),
    "BPE changed after it is joined": lambda: _byte_fallback(after=[decoders.Replace("the cat", "a dog")]),
    "Unigram": _unigram,
    "WordPiece": _word_piece,
    "BPE with ends of words": _end_of_word,
    "characters": _characters,
    "words, no decoder": _words,
}


def make(kind: str, path: Path, **settings: Any) -> FileTokenizer:
    """Writes a tokenizer of a kind to a folder, and reads it.

    Args:
        kind: Of `KINDS`.
        path: The folder.
        settings: Its tokenizer_config.json.
    """
    own = KINDS[kind]()
    own.add_tokens([AddedToken("[tool]", special=False)])
    path.mkdir(exist_ok=True)
    own.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>", **settings}))
    return FileTokenizer(path)
