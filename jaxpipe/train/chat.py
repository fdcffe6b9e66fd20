"""Chat templates: programs in Jinja that come with a model, so they run in a sandbox and see nothing but messages."""

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from jaxpipe.errors import ConfigError


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
        return _compile(template).render(
            messages=said, add_generation_prompt=True, tools=None, documents=None, **tokens
        )
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise ConfigError(f"the model's chat template refuses this conversation: {error}") from error


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

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(template)
