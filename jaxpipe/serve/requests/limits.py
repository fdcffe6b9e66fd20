"""How much the server takes on at once."""

from dataclasses import dataclass

from jaxpipe.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """What is refused, and when a request is given up.

    Attributes:
        body_bytes: The longest body (413).
        prompt_tokens: The longest prompt (400); 0 means what the engine holds.
        new_tokens: The most tokens a choice may ask for (400); 0 means what the engine holds.
        choices: The most answers one request may ask for: prompts times `n` (400).
        requests: Requests in progress, waiting ones included (429).
        request_s: Seconds from body to the last token; then 504, or an error in the stream.
        body_s: Seconds for a body to arrive (408), and for a client to take what is sent to it.
        head_s: Seconds for the head of a request to arrive (408).
        prompt_s: Seconds for prompts to become tokens (504).
        connections: At a time; beyond, a new one takes the place of the one that has waited longest for its client.
            Fewer where the system has not so many file handles.
    """

    body_bytes: int = 4 << 20
    prompt_tokens: int = 0
    new_tokens: int = 0
    choices: int = 16
    requests: int = 256
    request_s: float = 600.0
    body_s: float = 30.0
    head_s: float = 10.0
    prompt_s: float = 30.0
    connections: int = 1024

    def __post_init__(self):
        for name, least in (
            ("body_bytes", 1),
            ("prompt_tokens", 0),
            ("new_tokens", 0),
            ("choices", 1),
            ("requests", 1),
            ("connections", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"limits {name}={value!r} must be a whole number of at least {least}; try {least}")
        for name in ("request_s", "body_s", "head_s", "prompt_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"limits {name}={getattr(self, name)!r} must be seconds above 0; try 60")
