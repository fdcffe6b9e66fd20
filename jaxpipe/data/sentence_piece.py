"""A SentencePiece model (``spiece.model``, ``tokenizer.model``) as a tokenizer of the library tokenizers.

The file is a protocol buffer, of whose messages only what decides about tokens is declared here; see
sentencepiece_model.proto of SentencePiece (Kudo and Richardson, 2018).
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jaxpipe.errors import ConfigError

UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
SPACE, MAX_PIECE = "▁", 1000

_Field = tuple[str, int, str, str | None]
_MESSAGES: dict[str, tuple[_Field, ...]] = {
    "Piece": (("piece", 1, "STRING", None), ("score", 2, "FLOAT", None), ("type", 3, "INT32", "1")),
    "Trainer": (
        ("model_type", 3, "INT32", "1"),
        ("treat_whitespace_as_suffix", 24, "BOOL", None),
        ("byte_fallback", 35, "BOOL", None),
        ("unk_id", 40, "INT32", "0"),
        ("bos_id", 41, "INT32", "1"),
        ("eos_id", 42, "INT32", "2"),
    ),
    "Normalizer": (
        ("precompiled_charsmap", 2, "BYTES", None),
        ("add_dummy_prefix", 3, "BOOL", "true"),
        ("remove_extra_whitespaces", 4, "BOOL", "true"),
        ("escape_whitespaces", 5, "BOOL", "true"),
    ),
    "Model": (("pieces", 1, "*Piece", None), ("trainer", 2, "Trainer", None), ("normalizer", 3, "Normalizer", None)),
}
"""By message its fields: name, number, type, default."""


@cache
def _messages() -> dict[str, Any]:
    """The classes of the messages."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError as error:
        raise ConfigError("SentencePiece models need the library protobuf; try pip install 'jaxpipe[hf]'") from error
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="sentence_piece.proto", package="jaxpipe", syntax="proto2")
    for message, fields in _MESSAGES.items():
        made = file.message_type.add(name=message)
        for name, number, kind, default in fields:
            field = made.field.add(name=name, number=number, label=kinds.LABEL_OPTIONAL, default_value=default)
            if hasattr(kinds, f"TYPE_{kind}"):
                field.type = getattr(kinds, f"TYPE_{kind}")
                continue
            field.type, field.type_name = kinds.TYPE_MESSAGE, ".jaxpipe." + kind.removeprefix("*")
            field.label = kinds.LABEL_REPEATED if kind.startswith("*") else kinds.LABEL_OPTIONAL
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"jaxpipe.{name}")) for name in _MESSAGES}


def read_model(path: Path) -> Any:
    """The message in a file.

    Raises:
        ConfigError: It is none, or of a kind that this library cannot stand in for.
    """
    from google.protobuf.message import DecodeError

    model = _messages()["Model"]()
    try:
        model.ParseFromString(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise ConfigError(f"{path} is no SentencePiece model: {error}") from error
    if not model.pieces:
        raise ConfigError(f"{path} is no SentencePiece model: it holds no pieces")
    if (longest := max(len(piece.piece) for piece in model.pieces)) > MAX_PIECE:
        raise ConfigError(f"{path} is no SentencePiece model: a piece has {longest} characters, more than {MAX_PIECE}")
    if model.trainer.model_type not in (UNIGRAM, BPE) or model.trainer.treat_whitespace_as_suffix:
        raise ConfigError(f"{path} is a SentencePiece model of words or characters, which is not supported")
    return model


def sentence_piece(path: Path, extra: Sequence[str] = (), *, prefix_always: bool) -> Any:
    """The tokenizer of a SentencePiece model, with the ids and the text of the original.

    Args:
        path: The file.
        extra: Special tokens that come after its pieces.
        prefix_always: Whether text after a special token begins with a blank, as the whole text does.

    Raises:
        ConfigError: See `read_model`.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    spec = read_model(path)
    trainer, spaces = spec.trainer, spec.normalizer
    pieces = [(piece.piece, piece.score) for piece in spec.pieces] + [(token, 0.0) for token in extra]
    if len(dict(pieces)) < len(pieces) or not 0 <= trainer.unk_id < len(spec.pieces):
        raise ConfigError(f"{path} is no SentencePiece model: pieces occur twice, or unk_id={trainer.unk_id} is none")
    unknown = pieces[trainer.unk_id][0]
    if trainer.model_type == UNIGRAM:
        own = Tokenizer(models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback))
    else:
        vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
        options = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": trainer.byte_fallback}
        own = Tokenizer(models.BPE(vocab=vocab, merges=_merges(spec), **options))
    steps: list[Any] = []
    if spaces.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spaces.precompiled_charsmap))
    if spaces.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        own.normalizer = normalizers.Sequence(steps)
    scheme = ("always" if prefix_always else "first") if spaces.add_dummy_prefix else "never"
    within = any(SPACE in piece[1:] for piece, _ in pieces)
    own.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=not within)
    strip = [decoders.Strip(" ", left=1, right=0)] if spaces.add_dummy_prefix else []
    fallback = [decoders.ByteFallback()] if trainer.byte_fallback else []
    own.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), *fallback, decoders.Fuse(), *strip])
    special = [piece.piece for piece in spec.pieces if piece.type == CONTROL]
    own.add_special_tokens(
        [AddedToken(token, normalized=False) for token in dict.fromkeys([*special, unknown, *extra])]
    )
    own.add_tokens([AddedToken(p.piece, normalized=False) for p in spec.pieces if p.type == USER_DEFINED])
    return own


def _merges(spec: Any) -> list[tuple[str, str]]:
    """The merges of a BPE model, first those of the highest score: a piece can be made of any two others."""
    rank = {piece.piece: (-piece.score, i) for i, piece in enumerate(spec.pieces) if piece.type == NORMAL}
    found = [
        (*rank[piece], piece[:cut], piece[cut:])
        for piece in rank
        for cut in range(1, len(piece))
        if piece[:cut] in rank and piece[cut:] in rank
    ]
    return [(left, right) for _, _, left, right in sorted(found)]
