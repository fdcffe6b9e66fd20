"""The options of `/v1/completions` and `/v1/chat/completions`: names, ranges, defaults, and what is not supported.

Names and meanings are OpenAI's; `top_k`, `min_p` and `repetition_penalty` are what other servers call them too. Every
option is either honoured, told to be unsupported, or says nothing that could change the answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxpipe.documents import shown
from jaxpipe.infer.serving.handle import MAX_STOP_LENGTH, MAX_STOPS
from jaxpipe.serve.requests.fields import (
    Field,
    anything,
    flag,
    number,
    objects,
    one_of,
    read_fields,
    text,
    unsupported,
    whole,
)
from jaxpipe.serve.requests.problem import Problem

MAX_MESSAGES = 4096
"""Of a conversation, and parts of a message."""
ROLES = ("system", "developer", "user", "assistant")
SEEDS = 1 << 63

Prompt = str | list[int]


@dataclass(frozen=True)
class Ask:
    """What one request asks for.

    Attributes:
        model: Which model; None where it does not say.
        n: Answers per prompt.
        max_tokens: Tokens per answer at most; None: as many as there is room for.
        temperature: 0 takes the likeliest token.
        top_p: Share of the probability that tokens are drawn from.
        top_k: How many tokens are drawn from; 0 all.
        min_p: Tokens below this share of the likeliest one's probability are left out.
        repetition_penalty: Divides the logits of what was there before.
        seed: None: another one each time.
        stop: Texts that end an answer and are no part of it.
        logprobs: Whether log-probabilities of the tokens are wanted.
        echo: Whether the answer begins with the prompt.
        stream: Whether it comes piece by piece.
        include_usage: Whether the last piece counts tokens.
    """

    model: str | None
    n: int
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: tuple[str, ...]
    logprobs: bool
    echo: bool
    stream: bool
    include_usage: bool


def _stop(name: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > MAX_STOPS:
        raise Problem(400, f"{name}={shown(value)} must be a string or at most {MAX_STOPS} of them", param=name)
    for one in texts:
        if not text(name, one) or len(one) > MAX_STOP_LENGTH:
            raise Problem(400, f"{name}={shown(one)} must have 1 to {MAX_STOP_LENGTH} characters", param=name)
    return tuple(texts)


def _stream_options(name: str, value: Any) -> bool:
    fields = {"include_usage": Field(flag, False), "include_obfuscation": Field(unsupported(False))}
    return read_fields(objects(name, value), fields, f"{name}.")["include_usage"]


def _plain_text(name: str, value: Any) -> None:
    read_fields(objects(name, value), {"type": Field(one_of(("text",)), "text")}, f"{name}.")


SHARED = {
    "model": Field(text),
    "n": Field(whole(1), 1),
    "temperature": Field(number(0, 2), 1.0),
    "top_p": Field(number(0, 1, above=True), 1.0),
    "top_k": Field(whole(0, 1 << 30), 0),
    "min_p": Field(number(0, 1), 0.0),
    "repetition_penalty": Field(number(0.01, 100), 1.0),
    "seed": Field(whole(-SEEDS, SEEDS - 1)),
    "stop": Field(_stop, ()),
    "stream": Field(flag, False),
    "stream_options": Field(_stream_options),
    "user": Field(anything),
    "presence_penalty": Field(unsupported(0, 0.0)),
    "frequency_penalty": Field(unsupported(0, 0.0)),
    "logit_bias": Field(unsupported()),
}

COMPLETION = SHARED | {
    "prompt": Field(anything),
    "max_tokens": Field(whole(1), 16),
    "echo": Field(flag, False),
    "logprobs": Field(whole(0)),
    "best_of": Field(whole(1)),
    "suffix": Field(unsupported("")),
}

CHAT = (
    SHARED
    | {
        "messages": Field(anything),
        "max_tokens": Field(whole(1)),
        "max_completion_tokens": Field(whole(1)),
        "logprobs": Field(flag, False),
        "top_logprobs": Field(unsupported(0)),
        "response_format": Field(_plain_text),
        "store": Field(unsupported(False)),
        "metadata": Field(anything),
        "safety_identifier": Field(anything),
        "service_tier": Field(one_of(("auto", "default"))),
        "tool_choice": Field(unsupported("none")),
        "function_call": Field(unsupported("none")),
        "parallel_tool_calls": Field(anything),
        "modalities": Field(unsupported(["text"])),
    }
    | {
        name: Field(unsupported())
        for name in ("tools", "functions", "audio", "prediction", "reasoning_effort", "verbosity", "web_search_options")
    }
)


def read_completion(body: Mapping[str, Any]) -> tuple[list[Prompt], Ask]:
    """Reads the body of `/v1/completions`.

    Returns:
        Its prompts, and the rest.

    Raises:
        Problem: 400, see `read_fields`.
    """
    values = read_fields(body, COMPLETION)
    best_of, logprobs = values["best_of"], values["logprobs"]
    if best_of not in (None, values["n"]):
        raise Problem(400, f"best_of={best_of} is not supported; only best_of=n={values['n']} is", param="best_of")
    if logprobs:
        raise Problem(
            400,
            f"logprobs={logprobs} is not supported: there are log-probabilities of the chosen tokens only; "
            "try logprobs=0, which gives them",
            param="logprobs",
            code="unsupported_option",
        )
    if values["echo"] and logprobs is not None:
        raise Problem(400, "echo with logprobs is not supported; leave one of them out", param="echo")
    return _prompts(values["prompt"]), _ask(values, logprobs=logprobs is not None)


def read_chat(body: Mapping[str, Any]) -> tuple[list[dict[str, str]], Ask]:
    """Reads the body of `/v1/chat/completions`.

    Returns:
        Its messages with `role` and `content`, and the rest.

    Raises:
        Problem: 400, see `read_fields`.
    """
    values = read_fields(body, CHAT)
    old, new = values["max_tokens"], values.pop("max_completion_tokens")
    if None not in (old, new) and old != new:
        raise Problem(400, f"max_tokens={old} and max_completion_tokens={new} differ; leave out max_tokens")
    values["max_tokens"] = old if new is None else new
    messages = values["messages"]
    if not isinstance(messages, list) or not messages:
        raise Problem(400, f"messages={shown(messages)} must be a list of at least one message", param="messages")
    _check_count("messages", messages)
    return [_message(f"messages[{i}]", message) for i, message in enumerate(messages)], _ask(values)


def _ask(values: Mapping[str, Any], **changed: Any) -> Ask:
    values = {**values, "echo": values.get("echo", False), **changed}
    usage = values["stream_options"]
    if usage is not None and not values["stream"]:
        raise Problem(400, "stream_options has no effect without stream=true; leave it out", param="stream_options")
    return Ask(include_usage=bool(usage), **{name: values[name] for name in Ask.__annotations__ if name in values})


def _prompts(value: Any) -> list[Prompt]:
    """One text, several, one list of token ids, or several; which of them is told by the first element."""
    if isinstance(value, str):
        return [text("prompt", value)]
    if not isinstance(value, list) or not value:
        what = "is missing; it" if value is None else f"{shown(value)}"
        raise Problem(400, f"prompt {what} must be a string, a list of strings, or token ids", param="prompt")
    if isinstance(value[0], str):
        return [text(f"prompt[{i}]", one) for i, one in enumerate(value)]
    if isinstance(value[0], list):
        return [_token_ids(f"prompt[{i}]", one) for i, one in enumerate(value)]
    return [_token_ids("prompt", value)]


def _token_ids(name: str, value: Any) -> list[int]:
    if not isinstance(value, list):
        raise Problem(400, f"{name}={shown(value)} must be a list of token ids, as the first one is", param="prompt")
    for place, one in enumerate(value):
        if isinstance(one, bool) or not isinstance(one, int):
            raise Problem(400, f"{name}[{place}]={shown(one)} must be a token id, a whole number", param="prompt")
    return value


def _message(name: str, value: Any) -> dict[str, str]:
    fields = {
        "role": Field(one_of(ROLES)),
        "content": Field(anything),
        "name": Field(text),
        "refusal": Field(unsupported()),
        "tool_calls": Field(unsupported()),
        "function_call": Field(unsupported()),
        "audio": Field(unsupported()),
        "annotations": Field(unsupported()),
    }
    values = read_fields(objects(name, value), fields, f"{name}.")
    if values["role"] is None:
        raise Problem(400, f"{name} has no role; try {name}.role='user'", param=f"{name}.role")
    role = "system" if values["role"] == "developer" else values["role"]
    return {"role": role, "content": _content(f"{name}.content", values["content"])}


def _check_count(name: str, value: list[Any]):
    if len(value) > MAX_MESSAGES:
        raise Problem(400, f"{name} has {len(value)} entries and may have {MAX_MESSAGES}", param=name)


def _content(name: str, value: Any) -> str:
    if not isinstance(value, list):
        return text(name, value)
    _check_count(name, value)
    fields = {"type": Field(one_of(("text",)), "text"), "text": Field(text, "")}
    parts = [read_fields(objects(f"{name}[{i}]", part), fields, f"{name}[{i}].") for i, part in enumerate(value)]
    return "".join(part["text"] for part in parts)
