"""Reading one option of a request: its type and range, and what to say when it is something else.

A reader is a function ``(name, value) -> value`` that raises `Problem`. JSON's null stands for an option left out and
never reaches a reader.
"""

import difflib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from jaxpipe.documents import shown
from jaxpipe.serve.requests.problem import Problem

LARGEST = 1e30
"""Of any number; far from where whole numbers of JSON, which have no end, fit in no float."""

Reader = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Field:
    """One option: how it is read, and what it is where it is left out."""

    read: Reader
    default: Any = None


def read_fields(given: Mapping[str, Any], fields: Mapping[str, Field], where: str = "") -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        given: The object.
        fields: All that it may hold.
        where: What stands before the names in messages, such as ``stream_options.``.

    Returns:
        A value for every field.

    Raises:
        Problem: 400, for the first that is unknown or wrong.
    """
    for name in given:
        if name not in fields:
            near = difflib.get_close_matches(name[:60], fields, n=1)
            hint = f"; did you mean {where}{near[0]}?" if near else ""
            raise Problem(400, f"unknown option {shown(where + name)}{hint}", param=_param(where + name))
    return {
        name: field.default if given.get(name) is None else field.read(where + name, given[name])
        for name, field in fields.items()
    }


def number(low: float, high: float = math.inf, *, above: bool = False) -> Reader:
    """A number from `low` to `high`, or above `low`."""
    rule = f"{'above' if above else 'of at least'} {low:g}" + (f" and at most {high:g}" if math.isfinite(high) else "")

    def read(name: str, value: Any) -> float:
        fits = not isinstance(value, bool) and isinstance(value, int | float)
        if not fits or not (low < value if above else low <= value) or value > min(high, LARGEST):
            raise _wrong(name, value, f"a number {rule}", "1")
        return float(value)

    return read


def whole(low: int, high: int | None = None) -> Reader:
    """A whole number from `low` to `high`."""
    rule = f"a whole number of at least {low}" + ("" if high is None else f" and at most {high}")

    def read(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _wrong(name, value, rule, str(low))
        if value < low or (high is not None and value > high):
            raise _wrong(name, value, rule, str(low if value < low else high))
        return value

    return read


def flag(name: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false", "true")
    return value


def text(name: str, value: Any) -> str:
    """A text that UTF-8 can hold: JSON can also spell halves of surrogate pairs."""
    if not isinstance(value, str):
        raise _wrong(name, value, "a string", '"…"')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Problem(
            400, f"{name} holds half of a surrogate pair at character {error.start}, which is no text", param=name
        ) from None
    return value


def anything(name: str, value: Any) -> Any:
    """Whatever it is; for options that only tell OpenAI something about the caller."""
    return value


def unsupported(*neutral: Any) -> Reader:
    """An option that would change the answer and does not exist here; only values that ask for nothing are taken."""

    def read(name: str, value: Any) -> None:
        if not any(type(value) is type(other) and value == other for other in neutral) and value not in ([], {}):
            hint = f"; only {name}={neutral[0]!r} is" if neutral else "; leave it out"
            raise Problem(400, f"{name}={shown(value)} is not supported{hint}", param=name, code="unsupported_option")

    return read


def objects(name: str, value: Any) -> Mapping[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise _wrong(name, value, "an object", "{}")
    return value


def one_of(choices: Collection[str]) -> Reader:
    """One of some words."""

    def read(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            near = difflib.get_close_matches(value[:60] if isinstance(value, str) else "", choices, n=1, cutoff=0.0)[0]
            raise _wrong(name, value, f"one of {', '.join(choices)}", near)
        return value

    return read


def _param(name: str) -> str:
    """A name that a client made up, as UTF-8 has it and no longer than needed."""
    return name[:60].encode("utf-8", "backslashreplace").decode()


def _wrong(name: str, value: Any, rule: str, near: str) -> Problem:
    return Problem(400, f"{name}={shown(value)} must be {rule}; try {near}", param=name)
