"""Files that somebody made to do harm: bytes that are no document, and documents with one value that is odd."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

RAW = [
    b"",
    b"\0",
    b"\xff\xfe",
    b"[",
    b"[" * 100_000,
    b'{"a":' * 20_000,
    b'{"a":' + b"[" * 500 + b"]" * 500 + b"}",
    b"null",
    b"[]",
    b"5",
    b'"x"',
    b"NaN",
    b'{"a": 1e999}',
    b'{"a": ' + b"9" * 5000 + b"}",
    b"\xef\xbb\xbf{}",
]
ODD = [
    *(None, True, float("nan"), float("inf"), -1, 0, 0.5, 5e-324, 1e300, 10**9, 2**31, 2**63, 10**30, 10**200),
    *("", "1", "nan", "\x1b[31m", "\x9b31m", "\ud800", "\0", "x" * 10_000, "../../etc/passwd"),
    *([], {}, [[]], {"a": {}}, ["a"], [-1], [10**9] * 20, [2**40], json.loads("[" * 60 + "]" * 60)),
]
NAMES = ["\x1b]0;x\x07", "new", "../x", "a/b", "", "."]


def odd_documents(document: Any, count: int, seed: int = 0) -> Iterator[Any]:
    """Copies of a document in each of which one value is odd, missing or too much."""
    rng = random.Random(seed)
    places = list(_places(document))
    for _ in range(count):
        changed = copy.deepcopy(document)
        *way, last = rng.choice(places)
        inner = changed
        for step in way:
            inner = inner[step]
        what = rng.random()
        if what < 0.1:
            del inner[last]
        elif what < 0.2 and isinstance(inner, dict):
            inner[rng.choice(NAMES)] = rng.choice(ODD)
        else:
            inner[last] = copy.deepcopy(rng.choice(ODD))
        yield changed


def _places(value: Any, way: tuple = ()) -> Iterator[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value[:6]) if isinstance(value, list) else ()
    for name, inner in items:
        yield (*way, name)
        yield from _places(inner, (*way, name))
