"""What the server needs of an engine and of a tokenizer. `jaxpipe.infer.Engine` is one; tests bring others."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol


class Piece(Protocol):
    """One token of an answer, or its end."""

    @property
    def text(self) -> str:
        """Text that is now certain; empty while a character or a possible stop string is incomplete."""
        ...

    @property
    def token(self) -> int | None: ...

    @property
    def logprob(self) -> float | None: ...

    @property
    def finish_reason(self) -> str | None: ...

    @property
    def index(self) -> int:
        """Which of the request's answers."""
        ...


class Tokenizer(Protocol):
    """Text to tokens and back."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def pieces(self, text: str) -> list[int]:
        """The tokens of a text and no others."""
        ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def chat(self, messages: list[dict[str, str]]) -> str | None:
        """The conversation as the model's prompt, to be cut by `pieces`; None where the model has no template."""
        ...


class Handle(Protocol):
    """A request that the engine works on."""

    def listen(self, listener: Callable[[Piece | BaseException], None]) -> None:
        """Has every piece, also those that came before, given to `listener`, later ones in the engine's thread.

        The last one of each answer has a finish_reason. An exception instead says why there will be no more.
        """
        ...

    def cancel(self) -> None:
        """Lets the engine drop what has not ended; does nothing to a request that has."""
        ...


class Engine(Protocol):
    """What generates. All methods may be called from any thread, and none waits for a token."""

    @property
    def max_len(self) -> int:
        """Tokens of prompt and answer together that a sequence may have."""
        ...

    @property
    def error(self) -> BaseException | None:
        """Why the engine died; None while it lives."""
        ...

    def submit(self, request: Any) -> Handle:
        """Takes on a `jaxpipe.infer.Request`; QueueFullError where there is no room."""
        ...

    def metrics(self) -> Mapping[str, float]: ...
