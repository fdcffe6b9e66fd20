"""Small documents that somebody else wrote: read within bounds of size, depth and numbers, and only then believed.

A model's folder, a checkpoint or a schedule may come from anywhere. Every reader of such a file goes through here, so
that no file can eat the memory, overflow the stack or hand on a number that no float can hold.
"""

import json
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from jaxpipe.errors import JaxpipeError

MAX_BYTES = 64 << 20
"""Of one document. The longest honest ones, indexes of large models, have a few million bytes."""
MAX_DEPTH = 64
"""Of lists and objects within each other."""
MAX_DIGITS = 300
"""Of a whole number: all of these fit in a float."""


def read_bytes(path: Any, kind: type[JaxpipeError], *, most: int = MAX_BYTES) -> bytes:
    """A file that is not too long.

    Args:
        path: A `Path`, or any other that opens as one does.
        kind: What to raise.
        most: Its longest size in bytes.

    Raises:
        JaxpipeError: Of that kind: it cannot be read, is no file, or is too long.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for, a device has no end
            raise kind(f"{path} cannot be read: it is no file")
        with path.open("rb") as file:
            data = file.read(most + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, JaxpipeError):
            raise
        raise kind(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > most:
        raise kind(f"{path} is longer than {most:,} bytes, which no such file is")
    return data


def read_text(path: Any, kind: type[JaxpipeError], *, most: int = MAX_BYTES) -> str:
    """A text file, see `read_bytes`."""
    try:
        return read_bytes(path, kind, most=most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise kind(f"{path} must be UTF-8 but byte {error.start} is not") from error


def read_object(path: str | Path, kind: type[JaxpipeError], *, most: int = MAX_BYTES) -> dict[str, Any]:
    """A JSON object in a file.

    Args:
        path: The file.
        kind: What to raise.
        most: Its longest size in bytes.

    Raises:
        JaxpipeError: Of that kind: see `read_text` and `parse_json`, or it holds something else.
    """
    try:
        table = parse_json(read_text(Path(path), kind, most=most))
    except JaxpipeError:
        raise
    except ValueError as error:
        raise kind(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(table, dict):
        raise kind(f"{path} must hold a JSON object but holds {type(table).__name__}")
    return table


def parse_json(text: str, *, nan: bool = False) -> Any:
    """Decodes JSON strictly.

    Args:
        text: The document.
        nan: Whether ``NaN`` and ``Infinity``, which are no JSON, are taken all the same.

    Raises:
        ValueError: In one line: it is no JSON, nested more than `MAX_DEPTH` deep, or holds a number that is too large.

    Example:
        >>> parse_json('{"step": 3}')
        {'step': 3}
    """
    constant: Callable[[str], float] = float if nan else _no_constant
    try:
        value = json.loads(text, parse_constant=constant, parse_float=_float, parse_int=_int)
    except RecursionError:
        raise _too_deep() from None
    check_depth(value)
    return value


def check_depth(value: Any, most: int = MAX_DEPTH) -> None:
    """Refuses a value whose lists and dicts hold each other more than `most` deep.

    Raises:
        ValueError: It is one.
    """
    level, depth = [value], 0
    while level := [inner for outer in level if isinstance(outer, dict | list) for inner in _inside(outer)]:
        depth += 1
        if depth > most:
            raise _too_deep()


def shown(value: Any) -> str:
    """A value that somebody else wrote, short enough for a message, whatever its size and depth."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 60


def _inside(value: dict[str, Any] | list[Any]) -> Any:
    return value.values() if isinstance(value, dict) else value


def _too_deep() -> ValueError:
    return ValueError(f"it is nested too deeply, more than {MAX_DEPTH} levels")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"the number {text[:40]}… is too large")
    return int(text)
