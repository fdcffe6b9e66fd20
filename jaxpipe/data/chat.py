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
MAX_VALUE = 1 << 26
"""Characters or elements of a value that a template makes on its way: one doubled again and again ends there."""
MAX_BITS = 1 << 12
"""Of a power of whole numbers."""
PADDING = ("center", "indent", "truncate", "wordwrap", "batch", "slice", "tojson")
"""Filters that take a width or a count."""
WIDE = re.compile(r"%[^a-zA-Z%]*(\d{6}|\*)")
"""A field whose width is huge, or comes from elsewhere."""
FAR = re.compile(r"\{[^{}]*(\d{7}|\{)")
"""The same in ``str.format``."""


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
    """An operator of two values, unless what comes out is huge."""
    if operator == "+":
        _check_size(sum(len(each) for each in (left, right) if hasattr(each, "__len__")))
        return left + right
    for some, times in ((left, right), (right, left)):
        if isinstance(some, str | bytes | list | tuple) and isinstance(times, int) and len(some) * times > MAX_LENGTH:
            raise ValueError(f"a value of more than {MAX_LENGTH} elements")
    if operator == "%":
        if isinstance(left, str) and WIDE.search(left):
            raise ValueError("a field of a million characters")
        made = left % right
        _check_size(len(made) if isinstance(made, str) else 0)
        return made
    if operator == "**":
        if all(isinstance(each, int) for each in (left, right)) and left.bit_length() * right > MAX_BITS:
            raise ValueError(f"a number of more than {MAX_BITS} bits")
        return left**right
    return left * right


def _check_size(size: int) -> None:
    if size > MAX_VALUE:
        raise ValueError(f"a value of more than {MAX_VALUE} elements")


def _joined(parts: tuple) -> str:
    """What ``~`` makes of its operands."""
    texts = [str(part) for part in parts]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _check_call(name: str, text: Any, args: tuple) -> None:
    """Refuses methods and filters of texts whose result is huge."""
    if name == "replace" and isinstance(text, str) and len(args) > 1:
        _check_size(len(text) + text.count(str(args[0])) * len(str(args[1])))
    elif name == "join" and isinstance(text, str) and args and isinstance(args[0], list | tuple):
        _check_size(sum(len(str(each)) + len(text) for each in args[0]))
    elif name in ("format", "format_map") and FAR.search(str(text)):
        raise ValueError("a field of a million characters")
    elif name in ("center", "ljust", "rjust", "zfill", "expandtabs") and args and isinstance(args[0], int):
        _check_size(args[0] * (str(text).count("\t") if name == "expandtabs" else 1))


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
    from jinja2 import TemplateError, nodes, pass_eval_context
    from jinja2.compiler import CodeGenerator
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks for trainers what the assistant says; it writes what is in it."""

        tags = {"generation"}  # noqa: RUF012, the library's

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    class Code(CodeGenerator):
        """Compiles ``~`` so that its result can be measured first."""

        def visit_Concat(self, node: Any, frame: Any) -> None:
            self.write("environment.joined((")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write("))")

    def refuse(message: str):
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "%", "+"})
        code_generator_class = Code
        joined = staticmethod(_joined)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            return _calculate(operator, left, right)

        def call(self, context: Any, function: Any, *args: Any, **options: Any) -> Any:
            own = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
            _check_call(getattr(own, "__name__", ""), getattr(own, "__self__", None), args)
            made = super().call(context, function, *args, **options)
            _check_size(len(made) if isinstance(made, str) else 0)
            return made

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    environment.filters["tojson"] = to_json
    environment.filters |= {name: _sized(environment.filters[name]) for name in PADDING}
    own_replace, own_join = environment.filters["replace"], environment.filters["join"]

    @pass_eval_context
    def replace(context: Any, text: Any, old: str, new: str, *more: Any) -> str:
        _check_call("replace", str(text), (old, new))
        return own_replace(context, text, old, new, *more)

    @pass_eval_context
    def join(context: Any, values: Any, separator: str = "", *more: Any, **named: Any) -> str:
        values = list(values)
        if not more and not named:
            _check_call("join", separator, (values,))
        return own_join(context, values, separator, *more, **named)

    environment.filters |= {"replace": replace, "join": join}
    del environment.globals["lipsum"]
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(template)
