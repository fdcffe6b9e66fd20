"""Text from tokens that come one by one, of which nothing has to be taken back.

Two things are held back: the start of a character whose other bytes are yet to come, and what may be the start of a
stop string.
"""

from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"
"""What decoders write for bytes that are no character, or not yet."""


class TextStream:
    """The text of one sequence.

    Args:
        decode: Tokens to text.
        stops: The sequence ends before the first of these; none is empty.

    Example:
        >>> stream = TextStream(lambda tokens: bytes(tokens).decode(errors="replace"), stops=("END",))
        >>> [stream.push(byte) for byte in "hé, ENENDs".encode()]
        ['h', '', 'é', ',', ' ', '', '', 'EN', '', '', '']
        >>> stream.stopped
        True
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()):
        self._decode, self._stops = decode, tuple(stops)
        self._tokens: list[int] = []
        self._window, self._whole, self._sent = 0, 0, 0
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes a token; returns the text that is now certain."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        text = self._decode(self._tokens[self._window :])
        complete = not text.endswith(INCOMPLETE)
        certain = text if complete else text[:-1]
        fresh, self._sent = certain[self._sent :], max(self._sent, len(certain))
        if complete:
            # Decoders treat the first token of a text in a way of their own: the last whole piece stays in sight.
            self._window, self._whole = self._whole, len(self._tokens)
            self._sent = len(self._decode(self._tokens[self._window :]))
        return self._release(fresh)

    def finish(self) -> str:
        """The rest of the text: no more tokens will come."""
        if self.stopped:
            return ""
        fresh = self._decode(self._tokens[self._window :])[self._sent :] if self._tokens else ""
        released = self._release(fresh)
        held, self._held = self._held, ""
        return released + held

    def _release(self, fresh: str) -> str:
        """Adds text; returns what is before a stop string, and is not the start of one."""
        text = self._held + fresh
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        most = max(map(len, self._stops), default=1) - 1
        keep = next((n for n in range(min(most, len(text)), 0, -1) if self._may_start(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _may_start(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)
