"""Chat templates: programs in Jinja that come with a model, so they run in a sandbox and see nothing but messages."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

from jaxpipe.errors import ConfigError

MAX_LENGTH, MAX_TIMES = 1 << 20, 4
"""Characters of a prompt: that many, and that many times those of the messages."""
MAX_BITS = 1 << 12
"""Of a power of whole numbers."""
PADDING = ("center", "indent", "truncate", "wordwrap", "batch", "slice", "tojson")
"""Filters that take a width or a count."""
WIDE = re.compile(r"%[^a-zA-Z%]*(\d{6}|\*)")
"""A field whose width is huge, or comes from elsewhere."""


def render(template: str, messages: list[dict[str, Any]], tokens: Mapping[str, str | None]) -> str:
    """A conversation as a prompt that asks for the assistant's next words.

    Args:
        template: The program.
        messages: Each with ``role`` and ``content``.
        tokens: Special tokens by name, such as ``bos_token``.

    Raises:
        ConfigError: It is no Jinja, or it refuses the messages.

    Example:
        >>> template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
        >>> render(template, [{"role": "user", "content": "Hi"}], {})
        'user: Hi'
    """
    try:
        import jinja2
    except ImportError as error:
        raise ConfigError("chat templates need the library jinja2; try pip install 'jaxpipe[hf]'") from error
    try:
        said = [{key: value for key, value in message.items() if value is not None} for message in messages]
        parts = _compile(template).generate(
            messages=said, add_generation_prompt=True, tools=None, documents=None, **tokens
        )
        return _bounded(parts, MAX_TIMES * sum(map(len, _texts(messages))) + MAX_LENGTH)
    except jinja2.TemplateError as error:
        raise ConfigError(f"the model's chat template refuses this conversation: {error}") from error
    except Exception as error:  # a template is a program, and may raise anything, want of memory and stack included
        said = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"the model's chat template refuses this conversation: {said}") from error


def _bounded(parts: Iterator[str], most: int) -> str:
    """Parts together, if they are not too long."""
    whole, length = [], 0
    for part in parts:
        length += len(part)
        if length > most:
            raise ValueError(f"it makes more than {most} characters of it")
        whole.append(part)
    return "".join(whole)


def _texts(value: Any) -> Iterator[str]:
    """All texts in JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _calculate(operator: str, left: Any, right: Any) -> Any:
    """``left * right``, ``left ** right`` or ``left % right``, unless what comes out is huge."""
    for some, times in ((left, right), (right, left)):
        if isinstance(some, str | bytes | list | tuple) and isinstance(times, int) and len(some) * times > MAX_LENGTH:
            raise ValueError(f"a value of more than {MAX_LENGTH} elements")
    if operator == "%":
        if isinstance(left, str) and WIDE.search(left):
            raise ValueError("a field of a million characters")
        return left % right
    if operator == "**":
        if all(isinstance(each, int) for each in (left, right)) and left.bit_length() * right > MAX_BITS:
            raise ValueError(f"a number of more than {MAX_BITS} bits")
        return left**right
    return left * right


def _sized(own: Callable[..., Any]) -> Callable[..., Any]:
    """A filter without widths of millions of blanks."""

    @wraps(own)
    def sized(*given: Any, **named: Any) -> Any:
        if any(isinstance(each, int) and each > MAX_LENGTH for each in (*given[1:], *named.values())):
            raise ValueError(f"a number above {MAX_LENGTH} for the filter {own.__name__}")
        return own(*given, **named)

    return sized


@lru_cache(maxsize=8)
def _compile(template: str):
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks for trainers what the assistant says; it writes what is in it."""

        tags = {"generation"}  # noqa: RUF012, the library's

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def refuse(message: str):
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            return _calculate(operator, left, right)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    environment.filters["tojson"] = to_json
    environment.filters |= {name: _sized(environment.filters[name]) for name in PADDING}
    del environment.globals["lipsum"]
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(template)
