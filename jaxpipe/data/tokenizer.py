"""Text to tokens and back: by a model's own tokenizer, else byte by byte."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from jaxpipe.data.chat import render
from jaxpipe.data.panics import no_panics
from jaxpipe.data.runs import runs_of
from jaxpipe.data.vocab_files import (
    ADDED,
    FILE,
    SETTINGS,
    SPECIAL,
    class_of,
    content,
    files_of,
    from_files,
    read_json,
    settings_of,
)
from jaxpipe.documents import read_text
from jaxpipe.errors import ConfigError

TEMPLATE, MAX_TEMPLATE = "chat_template.jinja", 1 << 20
"""Its name, and its longest size in bytes."""
FILES = (
    FILE,
    SETTINGS,
    SPECIAL,
    TEMPLATE,
    "chat_template.json",
    "generation_config.json",
    ADDED,
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)
"""What belongs to a tokenizer in a folder of Hugging Face."""


class Tokenizer(Protocol):
    """Text to tokens and back."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, if there is one."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens with which the model ends what it writes: that one, and for chats often another."""
        ...

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt, with those that the model wants around it."""
        ...

    def pieces(self, text: str) -> list[int]:
        """The tokens of a text and no others."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; special ones have none, and what is no text becomes the replacement character."""
        ...

    def is_silent(self, token: int) -> bool:
        """Whether a token has no text and does not part those around it."""
        ...

    def in_run(self, token: int) -> bool:
        """Whether the text of a token depends on the whole run of such tokens that it is in."""
        ...

    def chat(self, messages: list[dict[str, Any]]) -> str | None:
        """A conversation as the model's prompt, whose tokens are its `pieces`; None where the model has no template.

        Raises:
            ConfigError: The template refuses the messages.
        """
        ...


class ByteTokenizer:
    """UTF-8, one token per byte.

    Example:
        >>> ByteTokenizer().encode("né"), ByteTokenizer().decode([110, 195, 169, 300])
        ([110, 195, 169], 'né\ufffd')
    """

    vocab_size: int = 256
    eos_id: int | None = None
    stop_ids: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    pieces = encode

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token if 0 <= token < 256 else 0xFF for token in map(int, tokens)).decode(errors="replace")

    def is_silent(self, token: int) -> bool:
        return False

    in_run = is_silent

    def chat(self, messages: list[dict[str, Any]]) -> str | None:
        return None


class FileTokenizer:
    """The tokenizer of a folder: its tokenizer.json, or what stands in for one, with what stands beside it.

    Args:
        path: The folder.

    Raises:
        ConfigError: It has none, or one that cannot be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._own = _load(self.path)
        self._own.no_truncation()
        self._own.no_padding()
        self._settings = settings_of(self.path)
        self.vocab_size: int = max(self._own.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        ends = self._configured_ends()
        named = self._special("eos_token")
        self.eos_id: int | None = self._own.token_to_id(named) if named is not None else next(iter(ends), None)
        own = () if self.eos_id is None else (self.eos_id,)
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys((*own, *ends)))

    def _configured_ends(self) -> list[int]:
        """The tokens that the model's own files give as ends of what it writes."""
        for name in ("generation_config.json", "config.json"):
            ids = read_json(self.path / name).get("eos_token_id")
            known = [token for token in (ids if isinstance(ids, list) else [ids]) if type(token) is int and token >= 0]
            if found := [token for token in known if self._own.id_to_token(token) is not None]:
                return found
        return []

    @no_panics()
    def encode(self, text: str) -> list[int]:
        bos = self._special("bos_token")  # who writes it already wants no second one
        return self._own.encode(text, add_special_tokens=not (bos and text.startswith(bos))).ids

    @no_panics()
    def pieces(self, text: str) -> list[int]:
        return self._own.encode(text, add_special_tokens=False).ids

    @no_panics()
    def decode(self, tokens: Sequence[int]) -> str:
        return self._own.decode([int(token) for token in tokens], skip_special_tokens=True)

    def is_silent(self, token: int) -> bool:
        return token in self._special_ids or self._own.id_to_token(token) is None

    def in_run(self, token: int) -> bool:
        return self._runs(self._own.id_to_token(token) or "")

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(id for id, token in self._own.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def _runs(self) -> Callable[[str], bool]:
        return runs_of(json.loads(self._own.to_str())["decoder"])

    def chat(self, messages: list[dict[str, Any]]) -> str | None:
        if self._template is None:
            return None
        names = [name for name in self._settings if name.endswith("_token")]
        return render(self._template, messages, {name: self._special(name) for name in names})

    @cached_property
    def _template(self) -> str | None:
        file = self.path / TEMPLATE
        if file.is_file():
            return read_text(file, ConfigError, most=MAX_TEMPLATE)
        own = self._settings.get("chat_template", read_json(self.path / "chat_template.json").get("chat_template"))
        if isinstance(own, list):  # several with names
            named = {each.get("name"): each.get("template") for each in own if isinstance(each, Mapping)}
            own = named.get("default")
        return own if isinstance(own, str) else None

    def _special(self, name: str) -> str | None:
        return content(self._settings.get(name))


def has_tokenizer(path: str | Path) -> bool:
    """Whether a folder has a tokenizer's files, ones that are not supported here included."""
    path = Path(path)
    return (path / FILE).is_file() or bool(files_of(path)) or class_of(path) == "ByT5Tokenizer"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder; byte by byte for no folder.

    Args:
        path: A folder with a tokenizer.json or what stands in for one, that file, or empty.

    Raises:
        ConfigError: It has none, or one that cannot be read.
    """
    if not str(path):
        return ByteTokenizer()
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"tokenizer {path} does not exist; name a folder with a {FILE}")
    with no_panics():
        return FileTokenizer(path.parent if path.name == FILE else path)


def copy_tokenizer(source: str | Path, to: Path, *others: str) -> str | None:
    """Copies a tokenizer's files, and others that are there. Where there is no tokenizer.json, one is made of them.

    Returns:
        Their names in words; None where there is no tokenizer.

    Raises:
        ConfigError: There is one that cannot be read.
    """
    source = Path(source)
    if not has_tokenizer(source):
        return None
    names = [name for name in FILES if (source / name).is_file()]
    own = None if FILE in names else _load(source)
    to.mkdir(parents=True, exist_ok=True)
    for name in (*names, *others):
        if (source / name).is_file():
            shutil.copyfile(source / name, to / name)
    if own is not None:
        own.save(str(to / FILE))
        (to / SETTINGS).write_text(json.dumps(settings_of(source), indent=2) + "\n", encoding="utf-8")
        names.insert(0, f"{FILE} (made of the others)")
    return ", ".join(names)


@no_panics()
def _load(path: Path) -> Any:
    """The library's tokenizer of a folder.

    Raises:
        ConfigError: See `FileTokenizer`.
    """
    file = path / FILE
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(f"{file} needs the library tokenizers; try pip install 'jaxpipe[hf]'") from error
    if not file.is_file():
        return from_files(path)
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more special
        raise ConfigError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from error
