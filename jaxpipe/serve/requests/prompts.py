"""From the prompts of a request to token ids that the engine has room for."""

from jaxpipe.documents import shown
from jaxpipe.errors import ConfigError
from jaxpipe.infer.serving.text_stream import TokenTexts
from jaxpipe.serve.requests.limits import Limits
from jaxpipe.serve.requests.problem import Problem
from jaxpipe.serve.requests.protocol import Tokenizer
from jaxpipe.serve.requests.schemas import Ask, Prompt

_NEAR = 16
"""Tokens of a prompt that its answer's text may depend on."""


class Prompts:
    """Turns prompts into tokens. Its methods take time for long ones: call them outside of the event loop.

    Args:
        tokenizer: The model's.
        limits: Of their length.
        max_len: Tokens of prompt and answer together that the engine holds.
        source_len: For an encoder-decoder, tokens of a prompt; all of `max_len` but a start token is the answer's then.
    """

    def __init__(self, tokenizer: Tokenizer, limits: Limits, max_len: int, source_len: int = 0):
        self._tokenizer = tokenizer
        self._limits = limits
        self._max_len = max_len
        self._source_len = source_len

    def encode(self, prompts: list[Prompt], ask: Ask) -> list[list[int]]:
        """The tokens of texts and of lists of token ids.

        Raises:
            Problem: 400, one is empty, too long or holds an id that the model does not have.
        """
        self._check_choices(len(prompts), ask)
        return [self._one("prompt" if len(prompts) == 1 else f"prompt[{i}]", p, ask) for i, p in enumerate(prompts)]

    def chat(self, messages: list[dict[str, str]], ask: Ask) -> list[list[int]]:
        """The tokens of a conversation, by the tokenizer's template.

        Raises:
            Problem: 400, there is no template, it refuses the messages, or the text is too long.
        """
        self._check_choices(1, ask)
        try:
            text = self._tokenizer.chat(messages)
        except ConfigError as error:
            raise Problem(400, " ".join(str(error).split()), param="messages") from error
        except Exception as error:  # a template is a program that came with the model, and may raise anything
            raise Problem(
                400, f"messages do not fit the model's chat template: {shown(str(error))}", param="messages"
            ) from error
        if text is None:
            raise Problem(
                400, "this model has no chat template; try /v1/completions", param="messages", code="no_chat_template"
            )
        return [self._one("messages", self._tokenizer.pieces(text), ask)]

    def room(self, tokens: list[int], ask: Ask) -> int:
        """How many tokens an answer to these may have."""
        return self._most(tokens) if ask.max_tokens is None else ask.max_tokens

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens.

        Raises:
            Problem: 500, the tokenizer fails.
        """
        try:
            return self._tokenizer.decode(tokens)
        except BaseException as error:  # in Rust it may panic, which is no Exception
            raise tokenizer_failed(error) from error

    def gap(self, prompt: list[int], tokens: list[int]) -> str:
        """What parts the text of a prompt from that of its answer: the blanks that decoders take off a beginning."""
        prompt = prompt[-_NEAR:]
        alone = self._tokenizer.decode(tokens)
        rest = self._tokenizer.decode(prompt + tokens)[len(self._tokenizer.decode(prompt)) :]
        return rest.removesuffix(alone) if rest.endswith(alone) else ""

    def texts(self) -> TokenTexts:
        """What tells of an answer's tokens, as they come, the text that each adds."""
        return TokenTexts(self._tokenizer)

    def _check_choices(self, prompts: int, ask: Ask):
        most = self._limits.choices
        if prompts * ask.n > most:
            raise Problem(
                400,
                f"n={ask.n} times {prompts} prompt{'s' * (prompts > 1)} must be at most {most} answers",
                param="n" if ask.n > 1 else "prompt",
            )

    def _one(self, name: str, prompt: Prompt, ask: Ask) -> list[int]:
        tokens = self._encode(prompt) if isinstance(prompt, str) else prompt
        param = name.partition("[")[0]
        if not tokens:
            raise Problem(400, f"{name} holds no tokens; it needs at least 1", param=param)
        held = self._source_len or self._max_len - 1
        longest = min(self._limits.prompt_tokens or held, held)
        if len(tokens) > longest:
            raise Problem(
                400,
                f"{name} has {len(tokens)} tokens and must have at most {longest}",
                param=param,
                code="context_length_exceeded",
            )
        size = self._tokenizer.vocab_size
        for place, token in enumerate(tokens):
            if not 0 <= token < size:
                raise Problem(400, f"{name}[{place}]={shown(token)} must be a token id below {size}", param=param)
        self._check_room(name, tokens, ask)
        return tokens

    def _encode(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text)
        except BaseException as error:  # see `decode`
            raise tokenizer_failed(error) from error

    def _check_room(self, name: str, tokens: list[int], ask: Ask):
        most = self._most(tokens)
        if ask.max_tokens is not None and ask.max_tokens > most:
            held = most < (self._limits.new_tokens or self._max_len)
            why = f"{name} has {len(tokens)} tokens and the model {self._max_len}" if held else "the server's limit"
            raise Problem(
                400,
                f"max_tokens={ask.max_tokens} must be at most {most}: {why}",
                param="max_tokens",
                code="context_length_exceeded",
            )

    def _most(self, tokens: list[int]) -> int:
        left = self._max_len - (1 if self._source_len else len(tokens))
        return min(left, self._limits.new_tokens or left)


def tokenizer_failed(error: BaseException) -> Problem:
    said = " ".join(str(error).split()) or type(error).__name__
    return Problem(500, f"the tokenizer failed: {shown(said)}", code="tokenizer_failed")
