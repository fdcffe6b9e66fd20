"""OpenAI's two forms of an answer, whole and in pieces: `text_completion` and `chat.completion`.

A choice is one of the answers that a request gets. Both forms are built from the same facts about it.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Token = tuple[str, float]
"""A token's text and log-probability."""


@dataclass
class Choice:
    """What is known of one answer.

    Attributes:
        text: Its text, or the part of it that one chunk brings.
        tokens: Its tokens with log-probabilities, where they are wanted.
        finish_reason: ``stop`` or ``length`` once it has ended.
        offset: Characters of the tokens before.
    """

    text: str = ""
    tokens: list[Token] | None = None
    finish_reason: str | None = None
    offset: int = 0

    def extend(self, new: "Choice"):
        """Adds what has come since."""
        self.text += new.text
        self.finish_reason = new.finish_reason
        for token in new.tokens or ():
            self.add(token)

    def add(self, token: Token):
        """Adds a token's log-probability."""
        if self.tokens is None:
            self.tokens = []
        self.tokens.append(token)


@dataclass(frozen=True)
class Form:
    """One of the two forms.

    Attributes:
        prefix: Of ids.
        kind: Of a whole answer.
        chunk_kind: Of a piece.
        choice: ``(index, choice) -> JSON`` in a whole answer.
        delta: ``(index, choice) -> JSON`` in a piece.
        opening: What each choice's first piece says before any text.
    """

    prefix: str
    kind: str
    chunk_kind: str
    choice: Callable[[int, Choice], dict[str, Any]]
    delta: Callable[[int, Choice], dict[str, Any]]
    opening: Callable[[int], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Answer:
    """The answer to one request: its id, and JSON of that form."""

    form: Form
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice], usage: dict[str, int]) -> dict[str, Any]:
        """All of it."""
        listed = [self.form.choice(index, choice) for index, choice in enumerate(choices)]
        return self._head(self.form.kind) | {"choices": listed, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> dict[str, Any]:
        """A piece; one with the usage has no choices."""
        return self._head(self.form.chunk_kind) | {"choices": choices} | ({"usage": usage} if usage else {})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"{self.form.prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """How many tokens went in and came out."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _text_choice(index: int, choice: Choice) -> dict[str, Any]:
    logprobs = None
    if choice.tokens is not None:
        offsets, at = [], choice.offset
        for text, _ in choice.tokens:
            offsets.append(at)
            at += len(text)
        logprobs = {
            "tokens": [text for text, _ in choice.tokens],
            "token_logprobs": [logprob for _, logprob in choice.tokens],
            "top_logprobs": None,
            "text_offset": offsets,
        }
    return {"index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.finish_reason}


def _chat_choice(index: int, choice: Choice) -> dict[str, Any]:
    message = {"role": "assistant", "content": choice.text, "refusal": None}
    return _chat(index, choice) | {"message": message}


def _chat_delta(index: int, choice: Choice) -> dict[str, Any]:
    return _chat(index, choice) | {"delta": {"content": choice.text} if choice.text else {}}


def _chat_opening(index: int) -> dict[str, Any]:
    return _chat(index, Choice()) | {"delta": {"role": "assistant", "content": ""}}


def _chat(index: int, choice: Choice) -> dict[str, Any]:
    logprobs = None
    if choice.tokens is not None:
        content = [
            {"token": text, "bytes": _bytes(text), "logprob": logprob, "top_logprobs": []}
            for text, logprob in choice.tokens
        ]
        logprobs = {"content": content, "refusal": None}
    return {"index": index, "logprobs": logprobs, "finish_reason": choice.finish_reason}


def _bytes(text: str) -> list[int] | None:
    """A token that is a part of a character decodes to U+FFFD, whose bytes would be wrong."""
    return None if "\ufffd" in text else list(text.encode())


TEXT = Form("cmpl", "text_completion", "text_completion", _text_choice, _text_choice)
CHAT = Form("chatcmpl", "chat.completion", "chat.completion.chunk", _chat_choice, _chat_delta, _chat_opening)
