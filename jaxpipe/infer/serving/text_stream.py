"""Text from tokens that come one by one, of which nothing has to be taken back.

Held back is what later tokens may still change: the start of a character, bytes that a decoder reads as a whole, and
what may be the start of a stop string.
"""

from collections.abc import Callable, Sequence
from typing import Any

INCOMPLETE = "\ufffd"
"""What decoders write for bytes that are no character, or not yet."""
LONG = 64
"""Tokens of a run; of a longer one all the text counts as the last one's."""


def _never(token: int) -> bool:
    return False


class TokenTexts:
    """The text that each token of a sequence adds to it. Joined they are what the tokenizer makes of all of it.

    Args:
        tokenizer: Has ``decode(tokens) -> str``. It may also have ``is_silent(token)``, for tokens that have no text
            and do not part those around them, and ``in_run(token)``, for those whose text depends on their whole run.

    Example:
        >>> from jaxpipe.infer.serving.text import ByteTokenizer
        >>> texts = TokenTexts(ByteTokenizer())
        >>> [texts.push(byte) for byte in "aé€".encode()]
        [['a'], [], ['', 'é'], [], [], ['', '', '€']]
    """

    def __init__(self, tokenizer: Any):
        self._decode: Callable[[list[int]], str] = tokenizer.decode
        self._is_silent: Callable[[int], bool] = getattr(tokenizer, "is_silent", _never)
        self._in_run: Callable[[int], bool] = getattr(tokenizer, "in_run", _never)
        # Decoders treat the start of a text in a way of their own: tokens that have text stay in sight of the next.
        self._seen: list[int] = []
        self._before = ""
        self._fresh: list[int] = []
        self._waiting: list[bool] = []  # whether each is in fresh; the others are silent
        self._running = False

    def push(self, token: int) -> list[str]:
        """Takes a token; returns the texts, one for each, of the tokens whose text is now certain."""
        silent = self._is_silent(token)
        if silent:
            self._waiting.append(False)
            return [] if self._fresh else self._settle("")
        running = self._in_run(token)
        settled = self.finish() if self._running and not running else []
        self._running = running
        self._fresh.append(token)
        self._waiting.append(True)
        if running:
            return settled
        text = self._text(len(self._fresh))
        return settled if text.endswith(INCOMPLETE) else settled + self._settle(text)

    def finish(self) -> list[str]:
        """The texts of the tokens that are left: no more will come."""
        return self._settle(self._text(len(self._fresh)))

    def _text(self, count: int) -> str:
        return self._decode(self._seen + self._fresh[:count])[len(self._before) :] if count else ""

    def _settle(self, text: str) -> list[str]:
        """The texts of all that wait, whose whole text is `text`: a character counts as its last token's."""
        texts, taken, at, few = [], 0, 0, len(self._fresh) <= LONG
        for speaks in self._waiting:
            own = ""
            if speaks:
                taken += 1
                part = text if taken == len(self._fresh) else self._text(taken) if few else ""
                if text.startswith(part) and (part == text or not part.endswith(INCOMPLETE)):
                    own, at = text[at : len(part)], max(at, len(part))
            texts.append(own)
        if self._fresh:
            alone = self._decode(self._fresh)
            # A text that starts with nothing but blanks may have been stripped of them.
            self._seen, self._before = (
                (self._fresh, alone) if alone else (self._seen + self._fresh, self._before + text)
            )
        self._fresh, self._waiting, self._running = [], [], False
        return texts


class TextStream:
    """The text of one sequence.

    Args:
        tokenizer: See `TokenTexts`.
        stops: The sequence ends before the first of these; none is empty.

    Example:
        >>> from jaxpipe.infer.serving.text import ByteTokenizer
        >>> stream = TextStream(ByteTokenizer(), stops=("END",))
        >>> [stream.push(byte) for byte in "hé, ENENDs".encode()]
        ['h', '', 'é', ',', ' ', '', '', 'EN', '', '', '']
        >>> stream.stopped
        True
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self._texts, self._stops = TokenTexts(tokenizer), tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes a token; returns the text that is now certain."""
        return "" if self.stopped else self._release("".join(self._texts.push(token)))

    def finish(self) -> str:
        """The rest of the text: no more tokens will come."""
        if self.stopped:
            return ""
        released = self._release("".join(self._texts.finish()))
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
