"""Files from anywhere: every reader takes them or says in one line what is wrong, and believes no size before that."""

import json
import os
import struct
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from etils import epath
from odd_values import ODD, RAW, odd_documents

from jaxpipe.checkpoint.meta import Meta, _digest, model_of
from jaxpipe.checkpoint.store import read_meta
from jaxpipe.checkpoint.weights import open_hf
from jaxpipe.cli.main import main
from jaxpipe.config import toml
from jaxpipe.config.run import SCHEMA
from jaxpipe.data.chat import render
from jaxpipe.data.panics import no_panics
from jaxpipe.data.tokenizer import load_tokenizer
from jaxpipe.documents import MAX_BYTES, parse_json, read_bytes, read_object
from jaxpipe.errors import CheckpointError, ConfigError, DataError, JaxpipeError
from jaxpipe.measure.profile import Profile, read_profile
from jaxpipe.models.gpt_config import PRESETS
from jaxpipe.schedule import Costs, build, from_csv, lower, simulate, to_csv
from jaxpipe.schedule.forms.json_form import from_json, to_json
from jaxpipe.screen import Screen, printable
from jaxpipe.train import load
from jaxpipe.train.report.metrics import read_lines
from jaxpipe.train.report.page import CURVES, _points, plot

HF = Path(__file__).parent / "data" / "hf"
SECONDS = 5.0
"""Far more than any of these files may take: one that is believed takes minutes, or all memory."""


def taken(read, *given):
    """Reads; what goes wrong must be a JaxpipeError, and soon."""
    began = time.monotonic()
    try:
        read(*given)
    except JaxpipeError as error:
        assert str(error)
    assert time.monotonic() - began < SECONDS


def description() -> dict:
    facts = {"step": 3, "row": 5, "time": 1e9, "loss": 1.0, "val_loss": None, "key": [0, 1], "schedule": "1f1b"}
    leaves = {"params/a/b": {"shape": [2, 3], "dtype": "float32", "sum": "x"}}
    leaves |= {"params/c": {"shape": [], "dtype": "bfloat16", "sum": "x"}}
    config = {"model": asdict(PRESETS["tiny"]), "data": {"tokenizer": "", "train": ["a"]}}
    return Meta(**facts, data={"seed": 1}, config=config, mesh={"pipe": 2}, leaves=leaves).to_json()


def write_description(folder: Path, facts) -> epath.Path:
    (folder / "3" / "meta").mkdir(parents=True, exist_ok=True)
    (folder / "3" / "meta" / "metadata").write_bytes(facts if isinstance(facts, bytes) else json.dumps(facts).encode())
    return epath.Path(folder / "3")


def sealed(facts):
    """With a digest that fits, so that all else is looked at."""
    facts = {name: value for name, value in facts.items() if name != "digest"}
    try:
        return {**facts, "digest": _digest(facts)}
    except ValueError:
        return facts


def test_descriptions_of_checkpoints(tmp_path):
    def use(facts):
        path = write_description(tmp_path, facts)
        meta = read_meta(path)
        assert meta.bytes >= 0 and time.localtime(meta.time)
        toml.write(meta.config)
        model_of(meta, path)

    use(description())
    for facts in odd_documents(description(), 200):
        taken(use, sealed(facts))
    for text in RAW:
        taken(use, text)


LIES = {
    "NaN": ({"loss": float("nan")}, "damaged"),
    "date": ({"time": 1e300}, r"time=1e\+300"),
    "step": ({"step": -1}, "step=-1"),
    "layers": ({"config": {"model": {**asdict(PRESETS["tiny"]), "num_layers": 10**9}}}, "at most 10000"),
    "shape": ({"leaves": {"params/a": {"shape": [2**40, 2**40], "dtype": "float32", "sum": ""}}}, "which no array has"),
    "object": ({"leaves": {"params/a": {"shape": [1], "dtype": "object", "sum": ""}}}, "dtype 'object'"),
    "outside": ({"leaves": {"../a": {"shape": [1], "dtype": "float32", "sum": ""}}}, "not described by"),
    "nested": ({"data": {"a": json.loads("[" * 70 + "]" * 70)}}, "is damaged"),
}


@pytest.mark.parametrize(("lie", "message"), LIES.values(), ids=LIES)
def test_a_description_that_lies_is_named_though_its_digest_fits(tmp_path, lie, message):
    facts = {**description(), **lie}
    with pytest.raises(CheckpointError, match=message):
        model_of(read_meta(write_description(tmp_path, sealed(facts))), "it")


def test_models_of_hugging_face(tmp_path):
    for family in ("gpt2", "qwen2", "t5"):
        config = json.loads((HF / family / "config.json").read_text())
        whole = (HF / family / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", whole[:8])
        head, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]

        def use(config, head, longer=0, body=body):
            text = head if isinstance(head, bytes) else json.dumps(head).encode()
            (tmp_path / "config.json").write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
            (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", (len(text) + longer) % 2**64) + text + body)
            _, weights = open_hf(tmp_path)
            weights.part(weights.table[0])

        use(config, head)
        for odd in odd_documents(config, 15):
            taken(use, odd, head)
        for odd in odd_documents(head, 15):
            taken(use, config, odd)
        for longer in (1, -1, 2**40, 2**63):
            taken(use, config, head, longer)
        for text in RAW:
            taken(use, text, head)
            taken(use, config, text)
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            if key in config:
                with pytest.raises(DataError, match=rf"{key}=1000000000, but the folder has \d+ tensors"):
                    use({**config, key: 10**9}, head)


def test_schedules(tmp_path):
    schedule = build("zb_v", devices=3, microbatches=6)
    file = tmp_path / "one.json"

    def use(document):
        file.write_text(json.dumps(document))
        read, costs = from_json(str(file))
        lower(read)
        simulate(read, costs or Costs())

    document = json.loads(to_json(schedule, Costs(hop=0.1)))
    use(document)
    for odd in odd_documents(document, 150):
        taken(use, odd)
    for text in RAW:
        file.write_bytes(text)
        taken(from_json, str(file))
        taken(from_csv, str(file))
    csv = to_csv(schedule)
    for place in range(0, len(csv), 7):
        for put in ("99999999", "\x1b", "\0", "(", "٣"):
            taken(from_csv, csv[:place] + put + csv[place + 1 :] + "\n,")


RUN = {
    "model": {"num_layers": 4, "num_heads": 2, "d_model": 16},
    "data": {"source": "text", "train": ["a.txt"]},
    "mesh": {"pipe": 2},
    "schedule": {"microbatches": 2},
    "train": {"steps": 3, "batch_size": 8, "seq_len": 8},
}


def test_configs(tmp_path):
    file = tmp_path / "run.toml"

    def use(text, *overrides):
        file.write_bytes(text)
        load(file, overrides)

    use(tomli_w.dumps(RUN).encode())
    odd = [value for value in ODD if value is not None and value != "\ud800"]
    for number, (section, key) in enumerate((section, key) for section, keys in SCHEMA.items() for key in keys):
        for value in odd[number % 3 :: 3]:
            taken(use, tomli_w.dumps({**RUN, section: {**RUN.get(section, {}), key: value}}).encode())
    deep = [b"[model]\nd_model=" + b"[" * 5000, b"a" + b".a" * 30_000 + b"=1", b"[model]\nd_model=" + b"9" * 6000]
    for text in (*RAW, *deep, b"[model]\nd_model=1979-05-27"):
        with pytest.raises(ConfigError):
            use(text)
    for override in ("model.d_model=" + "[" * 5000, "model.d_model=" + "9" * 6000, "train.steps=1e999", "=", "a=\0"):
        with pytest.raises(ConfigError):
            use(tomli_w.dumps(RUN).encode(), override)


def test_profiles(tmp_path):
    from jaxpipe.plan.cost import BlockCost, LaneTimes, ModelCosts

    sizes: Any = {"full": 1.0}
    block = BlockCost({"full": LaneTimes(1.0, 1.0, 1.0, 2.0)}, sizes, sizes, sizes, sizes, 1.0)
    numbers = [1.0] * 7
    costs = ModelCosts("measured", 2, 1, {"block": block}, *numbers, dtype_bytes=4, param_bytes=4)
    profile = Profile("cpu", "cpu", 2, {"d_model": 16}, {2: costs}, ((1024.0, 1e-4), (4096.0, 2e-4)), 1e10)
    file = tmp_path / "profile.json"

    def use(text):
        file.write_bytes(text)
        read = read_profile(file)
        read.hop_s(2048.0)
        assert all(cost.head_s >= 0 for cost in read.costs.values())

    use(profile.to_json().encode())
    assert read_profile(file) == profile
    for odd in odd_documents(json.loads(profile.to_json()), 200):
        taken(use, json.dumps(odd).encode())
    for text in RAW:
        with pytest.raises(ConfigError, match=r"profile .*profile\.json"):
            use(text)


def test_lines_of_metrics(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 1, "loss": 2.0, "lr": 0.1},
        {"step": 1, "val_loss": 2.0},
        {"step": 2, "event": "spike", "loss": 3.0},
    ]
    for odd in odd_documents(lines, 200):
        file.write_text("".join(json.dumps(line) + "\n" for line in odd))
        found = read_lines(file)
        for _, names in CURVES:
            if points := _points(found, names):
                plot(points, names)
    file.write_bytes(b"\n".join(RAW) + b'\n{"step": 7, "loss": NaN}\n{"step": 8, "loss": "x"}\n{"step": true}')
    assert [line["step"] for line in read_lines(file)] == [7]


def test_tokenizers(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "<s>": 3, " ": 4}, merges=[("a", "b")])
    own = tokenizers.Tokenizer(model)
    own.pre_tokenizer, own.decoder = tokenizers.pre_tokenizers.ByteLevel(), tokenizers.decoders.ByteLevel()
    own.add_special_tokens(["<s>"])
    settings = {"bos_token": "<s>", "eos_token": {"content": "<s>"}, "chat_template": "{{ messages[0].content }}"}
    ends = {"eos_token_id": [3]}

    def use(own, settings=settings, ends=ends):
        for name, value in (("tokenizer", own), ("tokenizer_config", settings), ("generation_config", ends)):
            text = value if isinstance(value, bytes) else json.dumps(value).encode()
            (tmp_path / f"{name}.json").write_bytes(text)
        tokenizer = load_tokenizer(tmp_path)
        for text in ("ab a", "日本", "\0"):
            tokenizer.decode(tokenizer.encode(text))
        tokenizer.chat([{"role": "user", "content": "hi"}])

    table = json.loads(own.to_str())
    use(table)
    for odd in odd_documents(table, 100):
        taken(use, odd)
    for odd in odd_documents(settings, 60):
        taken(use, table, odd)
    for odd in odd_documents(ends, 20):
        taken(use, table, settings, odd)
    for text in RAW:
        taken(use, text)
        taken(use, table, text)
        taken(use, table, settings, text)


TEMPLATES = [
    "{{ 'x' * 10**10 }}",
    "{{ [1] * 10**10 }}",
    "{{ 10**(10**6) }}",
    "{{ 'x'|center(10**9) }}",
    "{{ 'x'|center(1000000000) }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ lipsum(n=10**6) }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxx{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ '-' ~ messages[5].x.y }}",
    "{{ 1 / 0 }}",
    "{{ ''.__class__.__mro__ }}",
    "{% include 'x' %}",
    "{{ " + "(" * 5000,
    "{{ " + "-" * 20000 + "1 }}",
    "{{",
    "{{ 'a'.encode('zz') }}",
    "{{ strftime_now(5) }}",
    # A hundred doublings, each by another way.
    "{% set n = namespace(a='x' * 999) %}{% for i in range(100) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "{% set n = namespace(a='x' * 999) %}{% for i in range(100) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "{% set n = namespace(a=[1] * 999) %}{% for i in range(100) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "{% set n = namespace(a='x' * 999) %}{% for i in range(100) %}{% set n.a = n.a.replace('x', 'xx') %}{% endfor %}",
    "{% set n = namespace(a='x' * 999) %}{% for i in range(100) %}{% set n.a = n.a|replace('x', 'xx') %}{% endfor %}",
    "{% set n = namespace(a='x' * 999) %}{% for i in range(100) %}{% set n.a = [n.a, n.a]|join('') %}{% endfor %}",
    "{% set n = namespace(a='x' * 999) %}{% for i in range(100) %}{% set n.a = ''.join([n.a, n.a]) %}{% endfor %}",
    "{% set n = namespace(a='x' * 999) %}{% for i in range(100) %}{% set n.a = '%s%s' % (n.a, n.a) %}{% endfor %}",
    "{% set n = namespace(a='x' * 999) %}{% for i in range(100) %}{% set n.a = '{}{}'.format(n.a, n.a) %}{% endfor %}",
    "{{ 'x'.ljust(10**10) }}",
    "{{ '{:>10000000000}'.format('x') }}",
    "{{ '{:>{}}'.format('x', 10**10) }}",
]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda text: text[-50:])
def test_a_template_that_takes_too_much_or_fails_is_one_error(template):
    began = time.monotonic()
    with pytest.raises(ConfigError, match="chat template refuses") as caught:
        render(template, [{"role": "user", "content": "x"}], {})
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < SECONDS


def test_a_panic_in_rust_is_an_error_of_ours_and_an_interrupt_is_not():
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(ConfigError, match="the tokenizer failed: index out of bounds"), no_panics():
        raise panic("index out\nof bounds")
    with pytest.raises(KeyboardInterrupt), no_panics():
        raise KeyboardInterrupt


def test_documents_are_bounded(tmp_path):
    for text, message in (
        ("[" * 66 + "]" * 66, "nested"),
        ("1e999", "too large"),
        ("9" * 400, "too large"),
        ("NaN", "no number"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_json(text)
    assert parse_json("NaN", nan=True) != parse_json("NaN", nan=True)
    assert parse_json("[" * 64 + "]" * 64)
    (tmp_path / "long").write_bytes(b" " * (MAX_BYTES + 1))
    with pytest.raises(DataError, match="longer than"):
        read_object(tmp_path / "long", DataError)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="it is no file"):
        read_bytes(tmp_path / "pipe", DataError)
    with pytest.raises(DataError, match="No such file"):
        read_bytes(tmp_path / "nowhere", DataError)


# --- what reaches the terminal ---

STEERING = "a\x1b[31mb\x9bc\x07d\re\x7ff\u202eg\u2066h"


def test_text_that_steers_a_terminal_is_spelled_out():
    assert printable(STEERING) == r"a\x1b[31mb\x9bc\x07d\re\x7ff\u202eg\u2066h"
    assert printable("né 日本\t→\n") == "né 日本\t→\n"
    assert printable("\ud800") == r"\ud800"
    with open(os.devnull, "w", encoding="ascii") as file:
        assert Screen(file).write("né") == 2


def test_no_command_prints_stored_text_raw(tmp_path, capsys, monkeypatch):
    facts = description()
    config = {"model": {**facts["config"]["model"], "dtype": STEERING}, STEERING: {STEERING: STEERING}}
    leaves = {f"params/{name}": leaf for name, leaf in zip("ab", facts["leaves"].values(), strict=True)}
    lies = [
        {"schedule": STEERING},
        {"config": config},
        {"data": {STEERING: STEERING}},
        {"mesh": {STEERING: 2}},
        {"versions": {STEERING: STEERING}},
        {"leaves": leaves | {f"params/{STEERING}": facts["leaves"]["params/c"]}},
        {"leaves": {"params/a": {"shape": [1], "dtype": STEERING, "sum": STEERING}}},
        {STEERING: 1},
    ]
    run, store = tmp_path / "run", tmp_path / "run" / "checkpoints"
    schedule = json.loads(to_json(build("1f1b", devices=2, microbatches=2))) | {"name": STEERING}
    (tmp_path / "s.json").write_text(json.dumps(schedule))
    (tmp_path / "s.csv").write_text(f"0F0,{STEERING}\n")
    (tmp_path / "c.toml").write_text(
        f'[model]\n"{STEERING.encode("unicode_escape").decode()}" = 1\n'.replace("\\x", "\\u00")
    )
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": STEERING, "architectures": [STEERING]}))
    (tmp_path / "hf" / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    monkeypatch.chdir(tmp_path)
    commands = [
        ["schedule", "--from", "s.json"],
        ["schedule", "--from", "s.json", "--json"],
        ["schedule", "--from", "s.csv"],
        ["train", "c.toml"],
    ]
    commands += [["convert", "hf", "hf", "out"], ["generate", "hf", "--prompt", "x"], ["train", "c.toml", STEERING]]

    def check(words, codes):
        assert main(words) in codes, words
        out, err = capsys.readouterr()
        said = out + err
        assert said and not set(said) & set("\x1b\x9b\x07\r\x7f\u202e\u2066"), words

    for lie in lies:
        write_description(store, sealed({**facts, **lie}))
        for action in (["ls"], ["show"], ["show", "--json"], ["ls", "--json"]):
            check(["checkpoint", action[0], str(run), *action[1:]], (0, 1, 2))
        check(["eval", str(run)], (1, 2))
    for words in commands:
        check(words, (0, 1, 2))


COLOURS = """
import io, sys
from jaxpipe.cli import main
class Terminal(io.StringIO):
    encoding = "utf-8"
    def isatty(self):
        return True
sys.stdout = terminal = Terminal()
main(["schedule", "--from", sys.argv[1]])
sys.__stdout__.write(ascii(terminal.getvalue()))
"""


def test_a_terminal_gets_our_colours_and_no_others(tmp_path):
    schedule = json.loads(to_json(build("1f1b", devices=2, microbatches=2))) | {"name": "\x1b[8mhidden"}
    (tmp_path / "s.json").write_text(json.dumps(schedule))
    words = [sys.executable, "-c", COLOURS, str(tmp_path / "s.json")]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert r"\x1b[1m\\x1b[8mhidden" in said
    assert r"\x1b[8m" not in said.replace(r"\\x1b[8m", "")
