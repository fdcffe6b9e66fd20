"""Every key of a run's config, read off the sections: what it means, what it may be, what it is if it is not given."""

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jaxpipe.config import toml
from jaxpipe.config.run import SCHEMA, SECTIONS
from jaxpipe.errors import ConfigError
from jaxpipe.models.gpt_config import PRESETS, GPTConfig

NAMES = {int: "whole number", float: "number", bool: "true or false", str: "string"}
BUILT = {"model": GPTConfig, **SECTIONS}
PRESET = "Sizes to start from; the other keys of the section change it key by key."
FOLLOWS = {"vocab_size": "256 for bytes; else it must be given", "max_seq_len": "`train.seq_len`"}
"""Defaults of ``[model]`` that are not in its class."""


@dataclass(frozen=True)
class Key:
    """One key of a config.

    Attributes:
        section: Its section.
        name: Its name there.
        kind: What its value may be, in words, with the least and the most of a number.
        default: What it is if it is not given, as in a file; or in words.
        meaning: What it does, Markdown.
    """

    section: str
    name: str
    kind: str
    default: str
    meaning: str


def keys() -> Iterator[Key]:
    """All keys, in the order of the sections."""
    for section, table in SCHEMA.items():
        meanings = _attributes(BUILT[section])
        fields = {field.name: field for field in dataclasses.fields(BUILT[section])}
        for name, kind in table.items():
            if name not in fields:
                yield Key(section, name, _words(kind), "none", PRESET)
                continue
            default = fields[name].default
            if section == "model" and name in FOLLOWS:
                text = FOLLOWS[name]
            elif default is dataclasses.MISSING:
                text = "must be given, or a preset"
            else:
                text = "left out" if default is None else f"`{_value(default)}`"
            yield Key(section, name, _words(kind) + _range(BUILT[section], name, kind), text, meanings[name])


def markdown() -> str:
    """The page docs/config.md."""
    lines = [
        "# Every key of a config",
        "",
        "A run is a TOML file of sections (`configs/` has some), changed on the command line by `section.key=value`.",
        "This page is what `jaxpipe config keys --markdown` prints. `jaxpipe config show FILE` prints a run with every",
        "default filled in, `jaxpipe config check FILE` says whether it can be read.",
        "",
    ]
    for section, cls in BUILT.items():
        lines += [f"## [{section}]", "", _escape(_summary(cls)), ""]
        lines += ["| key | value | default | what it does |", "|---|---|---|---|"]
        for key in keys():
            if key.section == section:
                row = f"`{key.name}`", key.kind, key.default, key.meaning
                lines.append("| " + " | ".join(map(_escape, row)) + " |")
        lines.append("")
    return "\n".join(lines)


def text(names: Sequence[str] = (), width: int = 100) -> str:
    """The same for a terminal.

    Args:
        names: Sections, or keys with their section; none means all.
        width: Characters in a line.

    Raises:
        ConfigError: A name that there is not.
    """
    for name in names:
        if name not in SCHEMA:
            toml.find(name, SCHEMA)
    lines = []
    for section, cls in BUILT.items():
        found = [
            key
            for key in keys()
            if key.section == section and (not names or {section, f"{section}.{key.name}"} & set(names))
        ]
        if not found:
            continue
        lines += [f"[{section}]", *textwrap.wrap(_plain(_summary(cls)), width), ""]
        for key in found:
            lines.append(f"  {section}.{key.name}  {_plain(key.kind)}; default: {_plain(key.default)}")
            lines += textwrap.wrap(_plain(key.meaning), width, initial_indent="      ", subsequent_indent="      ")
        lines.append("")
    return "\n".join(lines).rstrip("\n")


def _summary(cls: type) -> str:
    """The prose of a docstring before its attributes, without the words that name the section."""
    prose = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:")[0]
    prose = re.sub(r"^Section `\[\w+\]`: (\w)", lambda match: match[1].upper(), prose)
    return " ".join(prose.split())


def _attributes(cls: type) -> dict[str, str]:
    """What a docstring of Google's style says of each attribute."""
    listed = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")[2].split("\n\n")[0]
    found: dict[str, list[str]] = {}
    for line in listed.splitlines():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            found[start[1]] = [start[2]]
        else:
            found[list(found)[-1]].append(line.strip())
    prose = {name: " ".join(lines).replace("``", "`") for name, lines in found.items()}
    return {name: re.sub(r"\bNone:", "Left out:", text) for name, text in prose.items()}


def _words(kind: Any) -> str:
    """A type in words."""
    if get_origin(kind) is Literal:
        return ", ".join(f'`"{choice}"`' for choice in get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_words(one) for one in get_args(kind) if one is not NoneType)
    if get_origin(kind) is tuple:
        item, _ = get_args(kind)
        return f"list of {NAMES[item]}s" if item in NAMES else f"list of {_words(item)}"
    return NAMES[kind]


def _range(cls: type, name: str, kind: Any) -> str:
    """The bounds of a number, found by trying."""
    kinds = set(get_args(kind) or [kind]) - {NoneType}
    if not kinds <= {int, float}:
        return ""
    whole = PRESETS["tiny"] if cls is GPTConfig else cls()

    def fits(value: float) -> bool:
        try:
            dataclasses.replace(whole, **{name: int(value) if kinds == {int} else float(value)})
        except ConfigError:
            return False
        return True

    least = "" if fits(-1) else " ≥ 0" if fits(0) else " ≥ 1" if kinds == {int} else " > 0"
    most = "" if fits(2) or kinds == {int} else " and ≤ 1" if fits(1) else " and < 1"
    return least + most


def _value(value: Any) -> str:
    """A value as TOML writes it."""
    return toml.write({"": {"": value}}).partition("= ")[2].strip()


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")


def _plain(markdown: str) -> str:
    return markdown.replace("`", "")
