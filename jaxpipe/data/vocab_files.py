"""Tokenizers of models that come without a tokenizer.json, from the files that they come with instead."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxpipe.data.sentence_piece import sentence_piece
from jaxpipe.documents import read_object
from jaxpipe.errors import ConfigError

FILE, SETTINGS, SPECIAL, ADDED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
SAVE = "save it there with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
CLASSES = {
    "gpt2": "GPT2Tokenizer",
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "t5": "T5Tokenizer",
}
"""The tokenizer of a model_type, where nothing names another."""
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 cuts text into words, from its published tokenizer.json."""

Settings = Mapping[str, Any]


def settings_of(path: Path) -> dict[str, Any]:
    """What the files beside a tokenizer say of it; for one without a tokenizer.json, with what its class says."""
    said = {**read_json(path / SPECIAL), **read_json(path / SETTINGS)}
    return said if (path / FILE).is_file() else {**DEFAULTS.get(class_of(path) or "", {}), **said}


def content(token: Any) -> str | None:
    """The text of a token as such files name it."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def class_of(path: Path) -> str | None:
    """The class of the tokenizer in a folder, by its settings, else by its model."""
    config = read_json(path / "config.json")
    named = read_json(path / SETTINGS).get("tokenizer_class") or config.get("tokenizer_class")
    if isinstance(named, str) and named.removesuffix("Fast") not in ("PreTrainedTokenizer", "TokenizersBackend"):
        return named.removesuffix("Fast")
    return CLASSES.get(str(config.get("model_type")))


def files_of(path: Path) -> list[str]:
    """The files in a folder that hold a vocabulary; none for bytes."""
    names = ("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model", "tekken.json")
    return [name for name in names if (path / name).is_file()]


def from_files(path: Path) -> Any:
    """The tokenizer of a folder without a tokenizer.json.

    Raises:
        ConfigError: It has none, one of a class that is not known here, or one that cannot be read.
    """
    name, files, settings = class_of(path), files_of(path), settings_of(path)
    make = MAKERS.get(name or "")
    if make is None:
        kind = "" if name is None else f", and the files of a {name} are not supported"
        raise ConfigError(f"{path} has no tokenizer.json{kind}; {SAVE}")
    try:
        own, start, end = make(path, settings)
        _add(own, path, settings)
        _surround(own, settings, start, end)
    except ConfigError:
        raise
    except Exception as error:  # the library raises nothing more special
        said = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} has no tokenizer.json, and {' and '.join(files)} cannot be read: {said}") from error
    return own


def _byte_level(path: Path, settings: Settings, qwen: bool) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if missing := [name for name in ("vocab.json", "merges.txt") if not (path / name).is_file()]:
        raise ConfigError(f"{path} has neither tokenizer.json nor {missing[0]}; {SAVE}")
    own = Tokenizer(models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt")))
    blank = settings.get("add_prefix_space") is True
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=blank, use_regex=not qwen)
    own.pre_tokenizer, own.decoder = by_bytes, decoders.ByteLevel()
    if qwen:
        own.normalizer = normalizers.NFC()
        own.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"), by_bytes])
    return own


def _gpt2(path: Path, settings: Settings) -> tuple[Any, bool, bool]:
    return _byte_level(path, settings, qwen=False), False, False


def _qwen2(path: Path, settings: Settings) -> tuple[Any, bool, bool]:
    return _byte_level(path, settings, qwen=True), False, False


def _llama(path: Path, settings: Settings) -> tuple[Any, bool, bool]:
    always = settings.get("legacy") is True
    return sentence_piece(_model(path, "tokenizer.model"), prefix_always=always), True, False


def _t5(path: Path, settings: Settings) -> tuple[Any, bool, bool]:
    extra = reversed(_sentinels(settings, 100))
    return sentence_piece(_model(path, "spiece.model"), list(extra), prefix_always=True), False, True


def _sentinels(settings: Settings, count: int) -> list[str]:
    """The tokens that stand for what was taken out of a text."""
    given = settings.get("extra_ids", count)
    return [f"<extra_id_{i}>" for i in range(given if isinstance(given, int) and 0 <= given <= 10_000 else count)]


def _byt5(path: Path, settings: Settings) -> tuple[Any, bool, bool]:
    """A token per byte after three special ones, and then the sentinels."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = [str(content(settings[name])) for name in BYT5]
    vocab = {token: i for i, token in enumerate(special)}
    vocab |= {char: len(special) + byte for byte, char in enumerate(_byte_characters())}
    own = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    more = _sentinels(settings, 125)
    own.add_special_tokens([AddedToken(token, normalized=False, lstrip=True, rstrip=True) for token in special])
    own.add_special_tokens([AddedToken(token, normalized=False) for token in more])
    return own, False, True


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (Radford et al., 2019)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + others.index(byte)) for byte in range(256)]


BYT5 = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
MAKERS: dict[str, Callable[[Path, Settings], tuple[Any, bool, bool]]] = {
    "GPT2Tokenizer": _gpt2,
    "Qwen2Tokenizer": _qwen2,
    "LlamaTokenizer": _llama,
    "T5Tokenizer": _t5,
    "ByT5Tokenizer": _byt5,
}
"""By class: the tokenizer, and whether its texts begin with BOS and end with EOS where the settings do not say."""
DEFAULTS = {
    "GPT2Tokenizer": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    "Qwen2Tokenizer": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "T5Tokenizer": BYT5,
    "ByT5Tokenizer": BYT5,
}
"""By class its special tokens, where the settings do not name them."""


def _model(path: Path, name: str) -> Path:
    found = next((path / each for each in (name, "tokenizer.model", "spiece.model") if (path / each).is_file()), None)
    if found is None:
        raise ConfigError(f"{path} has neither tokenizer.json nor {name}; {SAVE}")
    return found


def _add(own: Any, path: Path, settings: Settings) -> None:
    """Adds the tokens that the settings name, each with the id that they give it.

    Raises:
        ConfigError: An id is not the next one.
    """
    from tokenizers import AddedToken

    wanted: dict[int, Any] = {}
    for token, number in read_json(path / ADDED).items():
        wanted[number] = {"content": token, "special": False, "normalized": False}
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        wanted[int(number)] = token
    for number in sorted(wanted):
        facts = wanted[number]
        kinds = {key: bool(facts.get(key)) for key in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        text = str(content(facts))
        (own.add_special_tokens if kinds["special"] else own.add_tokens)([AddedToken(text, **kinds)])
        if own.token_to_id(text) != number:
            raise ConfigError(f"{path}: the token {text!r} has the id {own.token_to_id(text)} and not {number}")
    named = [content(token) for name, token in settings.items() if name.endswith("_token")]
    named += [content(token) for token in settings.get("additional_special_tokens") or ()]
    known = {token.content for token in own.get_added_tokens_decoder().values()}
    own.add_special_tokens([t for t in named if t and t not in known and own.token_to_id(t) is not None])


def _surround(own: Any, settings: Settings, start: bool, end: bool) -> None:
    """Has texts begin with BOS and end with EOS, where they shall."""
    from tokenizers import processors

    def ids(name: str, otherwise: bool) -> dict[str, int]:
        token = content(settings.get(f"{name}_token"))
        number = None if token is None else own.token_to_id(token)
        return {} if number is None or not settings.get(f"add_{name}_token", otherwise) else {str(token): number}

    before, after = ids("bos", start), ids("eos", end)
    if before or after:
        around = [*before, "$A", *after]
        own.post_processor = processors.TemplateProcessing(single=around, special_tokens=list((before | after).items()))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none.

    Raises:
        ConfigError: It holds none, or cannot be read.
    """
    return read_object(path, ConfigError) if path.is_file() else {}
