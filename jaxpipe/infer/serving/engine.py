"""Continuous batching: requests join and leave a ring that never stops.

One thread runs it all: it admits what waits while there are free slots, lets the ring turn for a fixed number of ticks,
and passes on the tokens that came. Slots have one size, and prompts are given to the model in chunks of one size, so
that there are three programs (an empty ring, admission, ticks), compiled once, whatever the requests.

In each tick a device computes at most the rows of a group and one chunk: that is the budget of tokens per step.
"""

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpipe.documents import shown
from jaxpipe.errors import ConfigError, QueueFullError
from jaxpipe.infer.generator import Generator, Row
from jaxpipe.infer.serving.handle import Finish, Handle, Piece, Request, RequestError
from jaxpipe.infer.serving.meter import Meter
from jaxpipe.infer.serving.text_stream import TextStream
from jaxpipe.runtime.layout.mesh import batch_shards


@dataclass
class Answer:
    """One sequence that an engine writes.

    Attributes:
        handle: Of its request.
        row: What the books get to know.
        text: Its text so far; None without a tokenizer.
        index: Which of the request's answers.
        slot: Where it is; -1 while it waits.
        count: Tokens passed on.
        first_s: When the first came.
        left: Whether it was given up, and its slot waits for the ring to be rid of it.
    """

    handle: Handle
    row: Row
    text: TextStream | None
    index: int
    slot: int = -1
    count: int = 0
    first_s: float = 0.0
    left: bool = False


class Engine:
    """Answers requests with a generator's model, many at a time. All methods may be called from any thread.

    Args:
        generator: The model. Its slots are those of the engine; the engine's state takes the memory of one more set of
            caches if the generator is used beside it.
        tokenizer: Turns tokens into text (``decode(tokens) -> str``), for `Piece.text` and stop strings. See
            `jaxpipe.infer.serving.text_stream.TokenTexts` for what else it may have.
        queue: Sequences that may wait for a slot.
        ticks: Ticks between two looks at the requests, at least the ring's period. More cost less on the host and
            answer later. By default the period: one token for every slot.

    Raises:
        ConfigError: An option out of range.
    """

    def __init__(self, generator: Generator, tokenizer: Any = None, *, queue: int = 256, ticks: int | None = None):
        ring = generator.ring
        ticks = ring.period if ticks is None else ticks
        for name, value, least in (("queue", queue, 1), ("ticks", ticks, ring.period)):
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}; try {least}")
        self.generator, self.tokenizer, self.queue = generator, tokenizer, queue
        self.ticks = ticks
        self.window = self.ticks // (ring.groups * ring.repeats) + 2
        self.program = generator.programs.steps(self.ticks, self.window)
        self.meter = Meter()
        self.error: BaseException | None = None
        self._changed = threading.Condition()
        self._waiting: deque[Answer] = deque()
        self._running: dict[int, Answer] = {}
        self._free = deque(generator.slot_of(n) for n in range(generator.slots))
        self._closing = self._left_behind = False
        self._tickets = 0
        self._thread = threading.Thread(target=self._run, name="jaxpipe-engine", daemon=True)
        self._thread.start()

    @property
    def max_len(self) -> int:
        """Tokens of prompt and answer together."""
        return self.generator.max_len

    @property
    def tokens_per_tick(self) -> int:
        """The most tokens that a device computes in a tick: the rows of a group, and a chunk of a prompt."""
        ring = self.generator.ring
        return ring.rows + max(ring.chunk, ring.source_len)

    def submit(self, request: Request) -> Handle:
        """Takes a request on.

        Raises:
            ConfigError: It cannot be answered: a prompt that is empty or too long, stop strings without a tokenizer.
            QueueFullError: As many sequences wait as may.
        """
        request = request.checked()
        if request.stop and self.tokenizer is None:
            raise ConfigError(f"stop={list(request.stop)!r} needs a tokenizer; try stop_token_ids")
        most = self.queue + self.generator.slots
        if request.n > most:
            raise ConfigError(f"n={shown(request.n)} exceeds queue + slots = {most}; try {most}")
        row = self.generator.check(request.prompt_tokens, request.sampling)
        handle = Handle(request, self._wake)
        answers = [
            Answer(handle, Row(row.tokens, row.sampling, index, row.source), self._text(request), index)
            for index in range(request.n)
        ]
        with self._changed:
            if self.error is not None:
                raise RuntimeError(f"the engine has stopped: {self.error}") from self.error
            if self._closing:
                raise ConfigError("the engine is closed and takes no requests; try a new one")
            if len(self._waiting) + request.n > self.queue + len(self._free):
                raise QueueFullError(
                    f"{len(self._waiting)} sequences wait and {request.n} more exceed queue={self.queue}; "
                    "try again later"
                )
            self._waiting.extend(answers)
            self.meter.requests += 1
            self._changed.notify_all()
        return handle

    def metrics(self) -> Mapping[str, float]:
        """Totals, mean times, and what is going on: `slots`, `slots_busy`, `queued`."""
        with self._changed:
            now = {"slots": self.generator.slots, "slots_busy": len(self._running), "queued": len(self._waiting)}
        return self.meter.read() | now

    def close(self, drain: bool = True, timeout_s: float | None = None) -> None:
        """Takes no more requests and ends.

        Args:
            drain: Whether what was taken on is answered first; else it is cancelled.
            timeout_s: How long to wait for that, by default for ever; then the thread, which hangs, is left behind,
                and `error` says so.
        """
        with self._changed:
            self._closing = True
            if not drain:
                for answer in (*self._waiting, *self._running.values()):
                    answer.handle.cancelled = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread and not self._left_behind:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                self._left_behind = True
                self.error = TimeoutError(f"the engine's thread did not end within {timeout_s:g} s")

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind, *_) -> None:
        self.close(drain=kind is None)

    def _text(self, request: Request) -> TextStream | None:
        return None if self.tokenizer is None else TextStream(self.tokenizer, tuple(request.stop))

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        """The engine's thread."""
        try:
            state = None
            while (joining := self._next()) is not None:
                if not joining and not self._running:
                    continue
                if state is None:
                    state = self.generator.programs.start()
                state = self._turn(state, joining)
        except BaseException as error:
            with self._changed:
                self.error = error
                left = [*self._waiting, *self._running.values()]
                self._waiting.clear()
                self._running.clear()
            for handle in dict.fromkeys(answer.handle for answer in left):
                handle.put(error)

    def _next(self) -> list[Answer] | None:
        """Waits for something to do. Returns what takes a slot now, None at the end."""
        with self._changed:
            while not self._waiting and not self._running:
                if self._closing:
                    return None
                self._changed.wait()
            dropped = [answer for answer in self._waiting if answer.handle.cancelled]
            self._waiting = deque(answer for answer in self._waiting if not answer.handle.cancelled)
            joining = []
            while self._waiting and self._free:
                answer = self._waiting.popleft()
                answer.slot = self._free.popleft()
                self._running[answer.slot] = answer
                joining.append(answer)
        for answer in dropped:  # not under the lock: who listens may hold one of their own that waits for this
            self._end(answer, Piece("", None, None, "cancelled", answer.index))
        return joining

    def _turn(self, state: Any, joining: list[Answer]) -> Any:
        """Admits, lets the ring turn, passes on what came."""
        generator, shards = self.generator, batch_shards(self.generator.mesh)
        for answer in joining:
            shard, slot = divmod(answer.slot, generator.ring.slots)
            try:
                row, source = generator.row(answer.row, self._tickets), generator.source(answer.row)
            except BaseException as error:
                self._fail(answer, error)
                continue
            self._tickets = (self._tickets + 1) % 2**31
            self.meter.prompt_tokens += len(answer.handle.request.prompt_tokens)
            state = generator.programs.admit(state, np.int32(shard), np.int32(slot), row, source)
        dismissed, known = np.zeros(generator.slots, bool), np.zeros(generator.slots, np.int32)
        for slot, answer in self._running.items():
            if answer.handle.cancelled and not answer.left:
                self._leave(answer, Piece("", None, None, "cancelled", answer.index))
            dismissed[slot], known[slot] = answer.left, len(answer.row.tokens) + answer.count
        state, report = self.program(generator.params, state, dismissed.reshape(shards, -1), known.reshape(shards, -1))
        first = {name: np.asarray(report[name][0]) for name in ("count", "tokens", "logprobs")}
        self._pass_on({name: rows.reshape(generator.slots, -1) for name, rows in first.items()}, dismissed)
        return state

    def _pass_on(self, report: dict[str, np.ndarray], dismissed: np.ndarray) -> None:
        """Gives every answer its new tokens, and frees slots."""
        now, came = time.monotonic(), 0
        freed = []
        for slot, answer in self._running.items():
            if answer.left:
                if dismissed[slot]:  # in all these ticks: nothing of it is in the ring any more
                    freed.append(slot)
                continue
            fresh = int(report["count"][slot, 0]) - answer.count
            for n in range(fresh):
                came += 1
                if answer.count == 0:
                    answer.first_s = now
                    self.meter.first_token(now - answer.handle.submitted_s)
                answer.count += 1
                try:
                    piece = self._piece(answer, int(report["tokens"][slot, n]), float(report["logprobs"][slot, n]))
                except BaseException as error:  # of the tokenizer: a panic of one in Rust is no Exception
                    self._fail(answer, error)
                    break
                if piece.finish_reason is None:
                    answer.handle.put(piece)
                    continue
                self.meter.answer(answer.count, now - answer.first_s)
                if self._over(answer, piece):
                    self._end(answer, piece)
                    freed.append(slot)
                else:
                    self._leave(answer, piece)
                break
        self.meter.step(came)
        with self._changed:
            for slot in freed:
                del self._running[slot]
                self._free.append(slot)

    def _piece(self, answer: Answer, token: int, logprob: float) -> Piece:
        """A token as the client sees it."""
        sampling, text = answer.row.sampling, ""
        reason: Finish | None = "length" if answer.count == sampling.max_new_tokens else None
        if token in sampling.stop_token_ids:
            reason = "stop"
        elif answer.text is not None:
            text = answer.text.push(token)
            reason = "stop" if answer.text.stopped else reason
        if reason is not None and answer.text is not None:
            text += answer.text.finish()
            reason = "stop" if answer.text.stopped else reason
        return Piece(text, token, logprob if sampling.logprobs else None, reason, answer.index)

    def _over(self, answer: Answer, piece: Piece) -> bool:
        """Whether the ring knows that an answer has ended; it knows nothing of stop strings."""
        sampling = answer.row.sampling
        return answer.count == sampling.max_new_tokens or piece.token in sampling.stop_token_ids

    def _leave(self, answer: Answer, piece: Piece) -> None:
        """Ends an answer of which the ring does not know it yet."""
        answer.left = True
        self._end(answer, piece)

    def _fail(self, answer: Answer, error: BaseException) -> None:
        """Ends the request of an answer, and no other, because of an error."""
        answer.left = True
        answer.handle.cancelled = True
        self.meter.failed += 1
        failed = RequestError(f"the request failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        failed.__cause__ = error
        answer.handle.put(failed)

    def _end(self, answer: Answer, piece: Piece) -> None:
        self.meter.cancelled += piece.finish_reason == "cancelled"
        self.meter.finished += piece.finish_reason != "cancelled"
        answer.handle.put(piece)
