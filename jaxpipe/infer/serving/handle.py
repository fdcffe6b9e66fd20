"""What a client holds of a request that an engine works on: the pieces of its answer, from any thread."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from jaxpipe.documents import shown
from jaxpipe.errors import ConfigError
from jaxpipe.infer.sampling import Sampling

Finish = Literal["stop", "length", "cancelled"]
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
"""Stop texts of a request, and characters of each: every token is looked at for all of them."""


class RequestError(RuntimeError):
    """A request that could not be answered, such as one whose tokens the tokenizer cannot make text of.

    The engine goes on; the exception's cause says what went wrong.
    """


@dataclass(frozen=True)
class Request:
    """What an engine is asked for.

    Attributes:
        prompt_tokens: The prompt; for an encoder-decoder the source.
        sampling: How it is continued.
        stop: Texts that end an answer and are not in it, at most 16 of 256 characters; one text alone is one. They
            need a tokenizer.
        n: Answers; each runs through the model on its own, the i-th with ``seed + i``.
    """

    prompt_tokens: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] | str = ()
    n: int = 1

    def checked(self) -> "Request":
        """The same with its stop texts as a tuple.

        Raises:
            ConfigError: A value of another type or out of range.
        """
        if not isinstance(self.sampling, Sampling):
            raise ConfigError(f"sampling={shown(self.sampling)} must be a Sampling; try Sampling()")
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ConfigError(f"n={shown(self.n)} must be a whole number of at least 1; try 1")
        given: Any = self.stop
        stops = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes) else (given,)
        good = all(isinstance(one, str) and 1 <= len(one) <= MAX_STOP_LENGTH for one in stops)
        if not good or len(stops) > MAX_STOPS:
            raise ConfigError(
                f"stop={shown(given)} must not hold empty texts, more than {MAX_STOPS}, or longer ones than "
                f"{MAX_STOP_LENGTH} characters; try ()"
            )
        return replace(self, stop=stops)


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
                except BaseException:  # also what no Exception is: it must not end the thread of all
                    self._listeners.remove(listener)
                    self.cancelled = True
