"""Chat templates: the prompt and the tokens that transformers makes of a conversation."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizing

from jaxpipe.data.chat import render
from jaxpipe.errors import ConfigError
from jaxpipe.serve import Limits
from jaxpipe.serve.requests.prompts import Prompts

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
WITH_BOS = "{{ bos_token }}" + PLAIN
MARKED = "{% for m in messages %}{%- generation -%}{% set x = 1 %}{{ m.content }}{% endgeneration %}{% endfor %}{{ x }}"
JSON = "{{ messages | tojson(ensure_ascii=True, indent=1) }}|{{ messages | tojson }}"
NAMES = "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
NULLS = "{% for m in messages %}{% if m.tool_calls is defined %}!{% endif %}{% endfor %}{{ documents is none }}"
TEMPLATES = {"no BOS": PLAIN, "BOS": WITH_BOS, "marks": MARKED, "JSON": JSON, "namespace": NAMES, "nulls": NULLS}
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "the cat 日本"},
    {"role": "assistant", "content": "sat é", "tool_calls": None},
]
WITH_STARTS = ("BPE with byte fallback", "Unigram")


def _chat(kind: str, template: str, path, adds_bos: bool):
    from tokenizers import Tokenizer, processors

    tokenizing.make(kind, path, chat_template=template)
    if adds_bos:
        own = Tokenizer.from_file(str(path / "tokenizer.json"))
        own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
        own.save(str(path / "tokenizer.json"))
    return tokenizing.FileTokenizer(path)


@pytest.fixture(params=[(kind, name) for kind in WITH_STARTS for name in TEMPLATES], ids=" ".join)
def chat(request, tmp_path):
    """A tokenizer that adds BOS, with a template; that template's name; and the tokens of the conversation."""
    kind, name = request.param
    tokenizer = _chat(kind, TEMPLATES[name], tmp_path, adds_bos=True)
    assert tokenizer.encode("the cat")[0] == 3
    ask: Any = SimpleNamespace(n=1, max_tokens=None)
    (tokens,) = Prompts(tokenizer, Limits(), max_len=500).chat(MESSAGES, ask)
    return tokenizer, name, tokens


def test_a_chat_has_the_special_tokens_that_its_template_writes(chat):
    _, name, tokens = chat
    assert tokens.count(3) == (name == "BOS")


def test_a_chat_is_the_one_of_transformers(chat, tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers, see the extra parity")
    tokenizer, name, tokens = chat
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>")
    options = {"chat_template": TEMPLATES[name], "add_generation_prompt": True}
    assert tokenizer.chat(MESSAGES) == theirs.apply_chat_template(MESSAGES, tokenize=False, **options)
    assert tokens == theirs.apply_chat_template(MESSAGES, return_dict=False, **options)


def test_what_is_marked_for_training_is_written_and_keeps_its_names():
    assert render(MARKED, MESSAGES, {}) == "the cat 日本sat é"
    with pytest.raises(ConfigError, match="refuses this conversation"):
        render("{% generation %}x", MESSAGES, {})


def test_json_in_a_template_keeps_letters_unless_asked():
    escaped, plain = render(JSON, MESSAGES[:1], {}).split("|")
    assert json.loads(escaped) == json.loads(plain) == MESSAGES[:1]
    assert escaped.isascii() and "日本" in plain
