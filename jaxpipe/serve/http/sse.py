"""Server-sent events: the framing of a stream of JSON values."""

import json
from typing import Any

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Proxies must pass pieces on as they come."""
MEDIA_TYPE = "text/event-stream"
DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    r"""One event.

    Example:
        >>> event({"text": "a\nb"})
        b'data: {"text":"a\\nb"}\n\n'
    """
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n".encode()
