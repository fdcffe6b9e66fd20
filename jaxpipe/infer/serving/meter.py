"""What an engine counts."""

import time
from collections import deque

WINDOW_S = 10.0
"""The time over which tokens per second are counted."""


class Meter:
    """Counts and times of an engine's work, written by its thread."""

    def __init__(self):
        self.requests = self.tokens = self.prompt_tokens = self.cancelled = self.finished = self.failed = self.steps = 0
        self._first_s, self._firsts, self._between_s, self._betweens = 0.0, 0, 0.0, 0
        self._recent: deque[tuple[float, int]] = deque()

    def first_token(self, waited_s: float) -> None:
        """An answer's first token came so long after its request."""
        self._first_s, self._firsts = self._first_s + waited_s, self._firsts + 1

    def answer(self, tokens: int, took_s: float) -> None:
        """An answer of so many tokens ended so long after its first."""
        if tokens > 1:
            self._between_s, self._betweens = self._between_s + took_s, self._betweens + tokens - 1

    def step(self, tokens: int) -> None:
        """A run of ticks gave so many tokens."""
        now = time.monotonic()
        self.steps, self.tokens = self.steps + 1, self.tokens + tokens
        self._recent.append((now, tokens))
        while self._recent and self._recent[0][0] < now - WINDOW_S:
            self._recent.popleft()

    def read(self) -> dict[str, float]:
        """All of them, by name: totals, and means in seconds."""
        recent = list(self._recent)
        since = [tokens for at, tokens in recent if at >= time.monotonic() - WINDOW_S]
        return {
            "requests_total": self.requests,
            "finished_total": self.finished,
            "cancelled_total": self.cancelled,
            "failed_total": self.failed,
            "prompt_tokens_total": self.prompt_tokens,
            "tokens_total": self.tokens,
            "steps_total": self.steps,
            "tokens_per_s": sum(since) / WINDOW_S,
            "time_to_first_token_s": self._first_s / max(1, self._firsts),
            "time_per_output_token_s": self._between_s / max(1, self._betweens),
        }
