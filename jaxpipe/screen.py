r"""What the terminal gets to see: text in which nothing steers it.

Names, messages and configs may come out of files that somebody else wrote, and a terminal obeys the control characters
in them: it can be made to hide lines, to rename its window, or to answer as if the user had typed.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and line end, characters that turn the direction of text, halves of surrogate pairs."""


def printable(text: str) -> str:
    r"""Text with every character that would steer a terminal spelled out.

    Example:
        >>> print(printable("red\x1b[31m"))
        red\x1b[31m
    """
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


class Screen:
    """A stream that passes on `printable` text, and of that what its encoding has.

    Args:
        raw: The stream behind it.
    """

    def __init__(self, raw: TextIO):
        self.raw = raw

    def write(self, text: str) -> int:
        encoding = getattr(self.raw, "encoding", None) or "utf-8"
        safe = printable(text).encode(encoding, "backslashreplace").decode(encoding)
        self.raw.write(safe)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


@contextmanager
def screened() -> Iterator[None]:
    """While entered, all that is printed goes through a `Screen`. Also a decorator."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and Screen(stream) for stream in before)  # None where there is no console
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def behind(stream: Any) -> Any:
    """The stream behind a screen, for programs that steer the terminal themselves."""
    return stream.raw if isinstance(stream, Screen) else stream


def for_text(stream: Any) -> Any:
    """Where to write text that a model wrote: exact into files and pipes, `printable` on a terminal."""
    return stream if stream.isatty() else behind(stream)
