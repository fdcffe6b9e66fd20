"""Tokenizers without a tokenizer.json: the tokens of transformers (stored, see scripts/tokenizer_fixtures.py)."""

import json
import shutil
from pathlib import Path

import pytest
from hf_models import write_folder

from jaxpipe.checkpoint.convert import from_hf, to_hf
from jaxpipe.data.sentence_piece import _messages
from jaxpipe.data.tokenizer import FileTokenizer, copy_tokenizer
from jaxpipe.errors import ConfigError
from jaxpipe.infer.load import load_model
from jaxpipe.infer.serving.text_stream import TextStream
from jaxpipe.models.gpt import PRESETS
from jaxpipe.runtime.layout.mesh import make_mesh

DATA = Path(__file__).parents[1] / "data" / "tokenizers"
NAMES = sorted(path.name for path in DATA.iterdir())


def expected(name):
    return json.loads((DATA / name / "expected.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_texts_are_those_of_transformers(name):
    own, wanted = FileTokenizer(DATA / name), expected(name)
    assert (own.vocab_size, own.eos_id) == (wanted["size"], wanted["eos"])
    for text, tokens, again in wanted["texts"]:
        assert own.encode(text) == tokens
        assert own.decode(tokens) == again
        stream = TextStream(own)
        assert "".join(map(stream.push, tokens)) + stream.finish() == again


@pytest.mark.parametrize("name", NAMES)
def test_the_tokenizer_of_a_run_is_one_file_that_says_the_same(name, tmp_path):
    assert "tokenizer.json (made of the others)" in (copy_tokenizer(DATA / name, tmp_path) or "")
    own, wanted = FileTokenizer(tmp_path), expected(name)
    assert (own.vocab_size, own.eos_id) == (wanted["size"], wanted["eos"])
    assert [own.encode(text) for text, _, _ in wanted["texts"]] == [tokens for _, tokens, _ in wanted["texts"]]


def test_a_model_goes_through_a_checkpoint_with_a_tokenizer_of_other_files(tmp_path):
    from dataclasses import replace

    write_folder(tmp_path / "hf", replace(PRESETS["tiny"], num_layers=2, num_heads=2, d_model=8, vocab_size=320))
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(DATA / "gpt2" / name, tmp_path / "hf" / name)
    from_hf(tmp_path / "hf", tmp_path / "run")
    to_hf(str(tmp_path / "run"), tmp_path / "back")
    text, tokens, _ = expected("gpt2")["texts"][0]
    for folder in ("hf", "run", "back"):
        assert load_model(tmp_path / folder, mesh=make_mesh(pipe=2)).tokenizer.encode(text) == tokens


def test_a_model_whose_tokens_nothing_explains_is_not_read_as_bytes(tmp_path):
    from dataclasses import replace

    cfg = replace(PRESETS["tiny"], num_layers=2, num_heads=2, d_model=8, vocab_size=320)
    write_folder(tmp_path / "hf", cfg)
    from_hf(tmp_path / "hf", tmp_path / "run")
    for folder in ("hf", "run"):
        with pytest.raises(ConfigError, match="has no tokenizer, and its model's 320 tokens are no bytes; put the"):
            load_model(tmp_path / folder, mesh=make_mesh(pipe=2))
    assert load_model(tmp_path / "hf", mesh=make_mesh(pipe=2), tokenizer="bytes").tokenizer.vocab_size == 256
    write_folder(tmp_path / "bytes", replace(cfg, vocab_size=256))
    assert load_model(tmp_path / "bytes", mesh=make_mesh(pipe=2)).tokenizer.vocab_size == 256


def _folder(path: Path, model_type: str, **files: bytes) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for name, data in files.items():
        (path / name.replace("_", ".")).write_bytes(data)
    return path


def _model(*more: str, **trainer) -> bytes:
    model = _messages()["Model"]()
    for piece in ("<unk>", "a", "b", *more):
        model.pieces.add(piece=piece, score=0.0)
    for name, value in trainer.items():
        setattr(model.trainer, name, value)
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("model_type", "files", "message"),
    [
        ("llama", {"tokenizer_model": b"IQ== 0\nIg== 1\n"}, "tokenizer.model is no SentencePiece model"),
        ("llama", {"tokenizer_model": b""}, "tokenizer.model is no SentencePiece model: it holds no pieces"),
        ("llama", {"tokenizer_model": _model(model_type=4)}, "a SentencePiece model of words or characters"),
        ("llama", {"tokenizer_model": _model(unk_id=7)}, "unk_id=7 is none"),
        ("llama", {"tokenizer_model": _model("c" * 10**6)}, "a piece has 1000000 characters, more than 1000"),
        ("mistral", {"tekken_json": b"{}"}, "has neither tokenizer.json nor tokenizer.model; save it there with"),
        ("gpt2", {"vocab_json": b"{}"}, "has neither tokenizer.json nor merges.txt"),
        ("gpt2", {"vocab_json": b"{", "merges_txt": b""}, "vocab.json and merges.txt cannot be read"),
        ("bert", {"vocab_txt": b"a\n"}, "has no tokenizer.json; save it there with transformers"),
    ],
)
def test_files_that_are_no_tokenizer_are_refused_in_a_line(tmp_path, model_type, files, message):
    folder = _folder(tmp_path / "own", model_type, **files)
    with pytest.raises(ConfigError, match=message):
        FileTokenizer(folder)
    with pytest.raises(ConfigError, match=message):
        copy_tokenizer(folder, tmp_path / "copy")


def test_a_class_that_is_not_known_is_named(tmp_path):
    folder = _folder(tmp_path / "own", "gpt2", vocab_txt=b"a\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(ConfigError, match="the files of a BertTokenizer are not supported; save it there"):
        FileTokenizer(folder)


def test_added_tokens_have_the_ids_that_they_are_given(tmp_path):
    shutil.copytree(DATA / "gpt2", tmp_path / "own")
    (tmp_path / "own" / "added_tokens.json").write_text('{"<x>": 320, "<y>": 321}')
    assert FileTokenizer(tmp_path / "own").pieces("<y><x>") == [321, 320]
    (tmp_path / "own" / "added_tokens.json").write_text('{"<x>": 327}')
    with pytest.raises(ConfigError, match="the token '<x>' has the id 320 and not 327"):
        FileTokenizer(tmp_path / "own")
