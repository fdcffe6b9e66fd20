"""An engine without a model: it says prompts again, token by token, from one thread, as the real one would.

Greedy answers repeat the prompt; sampled ones go through the alphabet from a letter that the seed gives. Every answer
is thus known beforehand, and one that got a token of another shows it.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from jaxpipe.infer import Handle, Piece, QueueFullError, Request

EOS = 256


class Bytes:
    """Bytes as tokens; the last one ends a text."""

    vocab_size = 257
    eos_id = EOS

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < EOS).decode(errors="replace")

    def pieces(self, text: str) -> list[int]:
        return self.encode(text)

    def chat(self, messages: list[dict[str, str]]) -> str | None:
        if [message["role"] for message in messages[-1:]] == ["assistant"]:
            raise ValueError("the last message must be the user's")
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


@dataclass(eq=False)
class Answer:
    """One of a request's answers."""

    handle: Handle
    index: int
    done: int = 0
    said: str = ""

    def step(self) -> bool:
        """Says one token; whether that was the last."""
        wanted, sampling = self.handle.request, self.handle.request.sampling
        if sampling.temperature:
            token = ord("a") + (sampling.seed + self.index + self.done) % 26
        else:
            token = wanted.prompt_tokens[self.done % len(wanted.prompt_tokens)]
        self.done += 1
        text = "" if token == EOS else chr(token) if token < 128 else "\ufffd"
        finish = "stop" if token in sampling.stop_token_ids else None
        if any((self.said + text).endswith(stop) for stop in wanted.stop):
            text, finish = "", "stop"
        if finish is None and self.done == sampling.max_new_tokens:
            finish = "length"
        self.said += text
        self.handle.put(Piece(text, token, -0.5, finish, self.index))
        return finish is not None


class FakeEngine:
    """Runs at most `slots` answers at a time and keeps `queue` waiting.

    Args:
        tick_s: Seconds between two tokens of an answer.
    """

    def __init__(self, *, slots: int = 16, queue: int = 512, max_len: int = 512, tick_s: float = 0.0):
        self.max_len = max_len
        self.error: BaseException | None = None
        self.cancels = 0
        self._slots, self._queue, self._tick_s = slots, queue, tick_s
        self._waiting: deque[Answer] = deque()
        self._running: list[Answer] = []
        self._wake = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether no answer runs or waits."""
        with self._wake:
            return not (self._waiting or self._running)

    def submit(self, request: Request) -> Handle:
        with self._wake:
            if len(self._waiting) + request.n > self._queue:
                raise QueueFullError(f"queue={self._queue} answers wait, the most there may be; try again later")
            handle = Handle(request, lambda: None)
            self._waiting.extend(Answer(handle, index) for index in range(request.n))
            self._wake.notify()
            return handle

    def metrics(self) -> dict[str, float]:
        return {"slots_busy": len(self._running), "queued": len(self._waiting), "slots": self._slots}

    def close(self):
        with self._wake:
            self._open = False
            self._wake.notify()
        self._thread.join()

    def die(self):
        """Fails as a device would."""
        self.error = RuntimeError("device lost")

    def _loop(self):
        for _ in itertools.count():
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._running or not self._open)
                if not self._open:
                    return
                while self._waiting and len(self._running) < self._slots:
                    self._running.append(self._waiting.popleft())
            if self.error is not None:
                for answer in [*self._running, *self._waiting]:
                    answer.handle.put(self.error)
                self._running, self._waiting = [], deque()
                continue
            left = [answer for answer in self._running if not answer.handle.cancelled]
            self.cancels += len(self._running) - len(left)
            self._running = [answer for answer in left if not answer.step()]
            if self._tick_s:
                time.sleep(self._tick_s)
