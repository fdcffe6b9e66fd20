"""Which tokens a decoder of the library tokenizers reads together, so that none of them has a text of its own."""

import re
from collections.abc import Callable, Mapping
from typing import Any

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_BY_TOKEN = {"BPEDecoder", "ByteFallback", "Metaspace", "Replace", "Strip", "WordPiece"}
"""Decoders of one token after the other. What they make of a text's beginning stays when the text goes on."""
_WHOLE = {"ByteLevel", "Fuse"}
"""Those that join all tokens to one text."""


def runs_of(decoder: Mapping[str, Any] | None) -> Callable[[str], bool]:
    """Whether the text of a token depends on the whole run of such tokens.

    With byte fallback, bytes are characters only if all neighbouring bytes are. Where a decoder changes the text after
    its tokens were joined, other than by taking blanks off its beginning, all tokens are one run.

    Args:
        decoder: As tokenizer.json has it; None for none.

    Example:
        >>> runs = runs_of({"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]})
        >>> runs("<0xE2>"), runs("a")
        (True, False)
    """
    steps = _steps(decoder) if decoder else []
    joined = next((i for i, step in enumerate(steps) if step["type"] in _WHOLE), len(steps))
    apart = all(step["type"] in _BY_TOKEN for step in steps[:joined])
    after = all(
        step["type"] == "Fuse" or (step["type"] == "Strip" and not step["stop"]) for step in steps[joined + 1 :]
    )
    if not apart or not after:
        return lambda token: True
    if any(step["type"] == "ByteFallback" for step in steps):
        return lambda token: _BYTE.fullmatch(token) is not None
    return lambda token: False


def _steps(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for each in decoder["decoders"] for step in _steps(each)]
