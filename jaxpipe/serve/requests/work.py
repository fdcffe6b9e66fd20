"""The work on one request: all its answers given to the engine, their pieces as they come, and an end in any case."""

import math
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

from jaxpipe.errors import ConfigError
from jaxpipe.infer import QueueFullError, Request, RequestError, Sampling
from jaxpipe.infer.serving.text_stream import TokenTexts
from jaxpipe.serve.requests.desk import RETRY_AFTER_S
from jaxpipe.serve.requests.form import Choice, usage
from jaxpipe.serve.requests.mailbox import Mailbox
from jaxpipe.serve.requests.metrics import Metrics
from jaxpipe.serve.requests.problem import Problem, engine_failed
from jaxpipe.serve.requests.prompts import Prompts, tokenizer_failed
from jaxpipe.serve.requests.protocol import Engine, Handle, Piece
from jaxpipe.serve.requests.schemas import Ask

Arrival = tuple[int, Piece | BaseException]
"""The number of a choice, and what came for it."""
IMPOSSIBLE = -9999.0
"""A log-probability that JSON has no number for, as OpenAI writes it."""


@dataclass
class Work:
    """One admitted request.

    Args:
        engine: Does it.
        prompts: Makes text of tokens.
        metrics: Counts.
        mailbox: Where the pieces arrive.
        ask: What is asked for.
        tokens: The prompts' tokens.
        echoes: What each answer begins with: nothing, or its prompt.
        stop_ids: Tokens that end an answer.
    """

    engine: Engine
    prompts: Prompts
    metrics: Metrics
    mailbox: Mailbox[Arrival]
    ask: Ask
    tokens: Sequence[list[int]]
    echoes: Sequence[str]
    stop_ids: tuple[int, ...]

    def __post_init__(self):
        self._handles: list[Handle] = []
        self._new_tokens = 0
        self._unsaid: dict[int, list[int]] = {}
        self._begun: set[int] = set()
        self._told: dict[int, tuple[TokenTexts, deque[float]]] = {}

    def start(self):
        """Gives all answers to the engine.

        Raises:
            Problem: 429, its queue is full; 503, it is dead.
        """
        seed = secrets.randbits(32) if self.ask.seed is None else self.ask.seed % 2**32
        try:
            for place, prompt in enumerate(self.tokens):
                handle = self.engine.submit(self._request(prompt, seed))
                self._handles.append(handle)
                handle.listen(partial(_arrive, self.mailbox, place * self.ask.n))
        except QueueFullError as error:
            raise Problem(429, str(error), code="queue_full", retry_after_s=RETRY_AFTER_S) from error
        except ConfigError as error:
            raise Problem(400, str(error)) from error
        except RuntimeError as error:
            if self.engine.error is None:
                raise
            raise engine_failed(self.engine.error) from error

    async def changes(self) -> AsyncIterator[dict[int, Choice]]:
        """What has come for the choices since the last time, until all have ended."""
        left = len(self.tokens) * self.ask.n
        began, offsets = time.monotonic(), [0] * left
        self.metrics.prompt_tokens.add(sum(map(len, self.tokens)))
        while left:
            new: dict[int, Choice] = {}
            for index, piece in await self.mailbox.take():
                if isinstance(piece, RequestError):
                    raise Problem(500, str(piece), code="request_failed") from piece
                if isinstance(piece, BaseException):
                    raise engine_failed(piece) from piece
                if piece.finish_reason == "cancelled":
                    raise Problem(503, "the engine was closed", code="engine_closed")
                if self._new_tokens == 0:
                    self.metrics.first_token.add(time.monotonic() - began)
                choice = new.setdefault(index, Choice(offset=offsets[index]))
                try:
                    self._add(index, choice, piece)
                except ConfigError as error:  # of the tokenizer, which makes text of tokens here too
                    raise tokenizer_failed(error) from error
                left -= piece.finish_reason is not None
            for index, choice in new.items():
                offsets[index] += sum(len(text) for text, _ in choice.tokens or ())
            yield new
        self.metrics.whole.add(time.monotonic() - began)

    def usage(self) -> dict[str, int]:
        """Tokens so far."""
        return usage(sum(map(len, self.tokens)), self._new_tokens)

    def close(self):
        """Drops what has not ended."""
        for handle in self._handles:
            handle.cancel()
        self.metrics.new_tokens.add(self._new_tokens)

    def _request(self, prompt: list[int], seed: int) -> Request:
        ask = self.ask
        sampling = Sampling(
            temperature=ask.temperature,
            top_k=ask.top_k,
            top_p=ask.top_p,
            min_p=ask.min_p,
            repetition_penalty=ask.repetition_penalty,
            seed=seed,
            max_new_tokens=self.prompts.room(prompt, ask),
            stop_token_ids=self.stop_ids,
            logprobs=ask.logprobs,
        )
        return Request(prompt, sampling, stop=ask.stop, n=ask.n)

    def _add(self, index: int, choice: Choice, piece: Piece):
        choice.text += self._after_echo(index, piece) + piece.text
        choice.finish_reason = piece.finish_reason
        if piece.token is None:
            return
        self._new_tokens += 1
        if not self.ask.logprobs or piece.logprob is None:
            return
        texts, logprobs = self._told.setdefault(index, (self.prompts.texts(), deque()))
        settled: list[str] = []
        if piece.token not in self.stop_ids:
            logprobs.append(piece.logprob if math.isfinite(piece.logprob) else IMPOSSIBLE)
            settled = texts.push(piece.token)
        if piece.finish_reason is not None:
            settled += texts.finish()
        for text in settled:
            choice.add((text, logprobs.popleft()))

    def _after_echo(self, index: int, piece: Piece) -> str:
        """What belongs between an echoed prompt and the first text of its answer."""
        if not self.ask.echo or piece.token is None or index in self._begun:
            return ""
        said = self._unsaid.setdefault(index, [])
        said.append(piece.token)
        if not piece.text:
            return ""
        self._begun.add(index)
        return self.prompts.gap(list(self.tokens[index // self.ask.n]), said)


def _arrive(mailbox: Mailbox[Arrival], first: int, piece: Piece | BaseException):
    index = 0 if isinstance(piece, BaseException) else piece.index
    mailbox.put_from_thread((first + index, piece))
