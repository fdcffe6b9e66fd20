"""What a client holds of a request that an engine works on: the pieces of its answer, from any thread."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxpipe.infer.sampling import Sampling

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Request:
    """What an engine is asked for.

    Attributes:
        prompt_tokens: The prompt; for an encoder-decoder the source.
        sampling: How it is continued.
        stop: Texts that end an answer and are not in it; they need a tokenizer.
        n: Answers; each runs through the model on its own, the i-th with ``seed + i``.
    """

    prompt_tokens: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    n: int = 1


@dataclass(frozen=True)
class Piece:
    """One token of an answer, or its end.

    Attributes:
        text: Text that is now certain: nothing of an incomplete character, a stop string, or what may become one.
            Without a tokenizer empty.
        token: The token; None where an answer was cancelled.
        logprob: See `Sampling`; None if it was not asked for.
        finish_reason: Of the last piece of an answer: ``stop``, ``length`` or ``cancelled``.
        index: Which of the request's n answers.
    """

    text: str
    token: int | None
    logprob: float | None = None
    finish_reason: Finish | None = None
    index: int = 0


Listener = Callable[[Piece | BaseException], None]


class Handle:
    """A request that was taken on. Iterating over it gives the pieces as they come, of all its answers.

    Args:
        request: What was asked for.
        wake: Tells the engine to look at it.
    """

    def __init__(self, request: Request, wake: Callable[[], None]):
        self.request, self._wake = request, wake
        self.submitted_s = time.monotonic()
        self.cancelled = False
        self._lock = threading.Lock()
        self._pieces: list[Piece | BaseException] = []
        self._listeners: list[Listener] = []
        self._left = request.n

    def listen(self, listener: Listener) -> None:
        """Has every piece, also those that came before, given to `listener`, later ones in the engine's thread.

        The last piece of each answer has a finish reason. An exception instead says why there will be no more. A
        listener that raises hears no more, and its request is cancelled.
        """
        with self._lock:
            for piece in self._pieces:
                listener(piece)
            self._listeners.append(listener)

    def __iter__(self) -> Iterator[Piece]:
        """The pieces, waited for. Raises what ended the engine, if anything did."""
        came: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.listen(came.put)
        left = self.request.n
        while left:
            piece = came.get()
            if isinstance(piece, BaseException):
                raise piece
            left -= piece.finish_reason is not None
            yield piece

    def cancel(self) -> None:
        """Lets the engine drop what has not ended; does nothing to a request that has."""
        self.cancelled = True
        self._wake()

    @property
    def done(self) -> bool:
        """Whether all answers have ended."""
        return self._left <= 0

    def put(self, piece: Piece | BaseException) -> None:
        """Passes a piece on; the engine's own."""
        with self._lock:
            if self.done:
                return
            self._left -= self._left if isinstance(piece, BaseException) else piece.finish_reason is not None
            self._pieces.append(piece)
            for listener in list(self._listeners):
                try:
                    listener(piece)
                except Exception:
                    self._listeners.remove(listener)
                    self.cancelled = True
