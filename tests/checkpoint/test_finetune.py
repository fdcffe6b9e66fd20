"""A small random GPT-2 in the form of Hugging Face: converted, trained on through a pipeline, measured, handed back."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from hf_models import CPU, write_folder
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxpipe.checkpoint.weights import open_hf
from jaxpipe.cli.main import main
from jaxpipe.infer.load import load_model
from jaxpipe.infer.serving.text import ByteTokenizer, load_tokenizer
from jaxpipe.models.gpt import PRESETS
from jaxpipe.models.hf import config_json

ROOT = Path(__file__).parents[2]
CFG = replace(PRESETS["tiny"], num_layers=2, num_heads=2, d_model=16, vocab_size=300, max_seq_len=32)
TEXT = "It was the best of times, it was the worst of times. Ünïcode too.\n" * 40
SMALL = ["mesh.simulate=2", "train.steps=2", "train.seq_len=16", "train.batch_size=4", "schedule.microbatches=2"]


def write_tokenizer(folder: Path) -> Tokenizer:
    """Writes a small tokenizer in the form of GPT-2's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    made.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{{ raise_exception('no') if not messages }}"
    settings = {"eos_token": {"content": "<|endoftext|>"}, "bos_token": "<|endoftext|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return made


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with ``gpt2`` and ``book.txt``."""
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "gpt2", CFG)
    write_tokenizer(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps({**config_json(CFG), "eos_token_id": 0}))
    (tmp_path / "book.txt").write_text(TEXT)
    return tmp_path


def test_in_train_eval_out(folder, capsys):
    assert main(["convert", "hf", "gpt2", "runs/gpt2", "--dtype", "float32"]) == 0
    assert main(["checkpoint", "verify", "runs/gpt2"]) == 0
    assert (
        main(["train", str(ROOT / "configs" / "gpt2-finetune.toml"), *SMALL, "schedule.repeats=1", "sample.length=4"])
        == 0
    )
    told = capsys.readouterr().out
    assert "weights    of step 0 of runs/gpt2" in told and "tokens to train on" in told and "--- sample" in told

    assert main(["eval", "runs/gpt2-finetune", "--data", "book.txt", "--json"]) == 0
    score = json.loads(capsys.readouterr().out)
    tokenizer = load_tokenizer("gpt2")
    ids = tokenizer.pieces(TEXT)
    assert score["tokens"] == len(ids) // 16 * 16
    per_byte = score["loss"] / np.log(2) * (len(ids) + 1) / len(TEXT.encode())
    assert score["bits_per_byte"] == pytest.approx(per_byte, rel=1e-6)

    here = ["--pipe", "2", "--data", "1", "--chunk", "8", "--max-new-tokens", "4"]
    assert main(["generate", "runs/gpt2-finetune", "--prompt", "It was", *here, "--json"]) == 0
    (written,) = json.loads(capsys.readouterr().out)
    assert written["finish_reason"] in ("length", "stop")

    assert main(["convert", "to-hf", "runs/gpt2-finetune", "back", "--max-shard-size", "30kB"]) == 0
    assert json.loads((folder / "back" / "config.json").read_text())["eos_token_id"] == 0
    assert (folder / "back" / "tokenizer.json").read_bytes() == (folder / "gpt2" / "tokenizer.json").read_bytes()
    loaded = load_model("runs/gpt2-finetune")
    cfg, weights = open_hf("back")
    assert replace(loaded.cfg, dropout=0.0) == cfg == replace(CFG, dropout=0.0)
    jax.tree.map(np.testing.assert_array_equal, loaded.canonical, weights.tree(lambda shape: CPU))
    start = load_file(folder / "gpt2" / "model.safetensors")["transformer.wte.weight"]
    assert not np.array_equal(loaded.canonical["embed"]["table"], start)
    assert loaded.tokenizer.encode("It was") == tokenizer.encode("It was")
    assert load_model("back").tokenizer.eos_id == 0


def test_wrong_input_is_one_line_and_exit_code_2(folder, capsys):
    (folder / "taken").mkdir()
    (folder / "taken" / "file").touch()
    (folder / "empty").mkdir()
    cases = [
        (["hf", "nowhere", "out"], "nowhere does not exist"),
        (["hf", "book.txt", "out"], "book.txt is no folder"),
        (["hf", "empty", "out"], "empty has no config.json"),
        (["hf", "gpt2", "taken"], "taken is there already and is not empty"),
        (["hf", "gpt2", "book.txt"], "book.txt is there already"),
        (["hf", "gpt2", "out", "--dtype", "int8"], "--dtype 'int8' must be one of float32"),
        (["to-hf", "nowhere", "out"], "nowhere does not exist"),
        (["to-hf", "gpt2", "out"], "gpt2 is not a checkpoint of jaxpipe"),
        (["to-hf", "gpt2", "out", "--max-shard-size", "0"], "--max-shard-size '0' must be a size such as 500MB"),
    ]
    for words, message in cases:
        assert main(["convert", *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (folder / "out").exists() and not list(folder.glob(".*.part"))


def test_tokenizers(folder):
    tokenizer = load_tokenizer("gpt2")
    for text in ("It was the best", "Ünïcode 日本 \U0001f600\n\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.eos_id, tokenizer.vocab_size <= 300) == (0, True)
    assert tokenizer.decode([0, *tokenizer.pieces("It")]) == "It"
    shutil.copytree(folder / "gpt2", folder / "chatty")
    (folder / "chatty" / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 0, 10**6]}))
    assert (tokenizer.stop_ids, load_tokenizer("chatty").stop_ids) == ((0,), (0, 7))
    assert tokenizer.chat([{"role": "user", "content": "Hi"}]) == "<user>Hi"
    with pytest.raises(ValueError, match="refuses this conversation: no"):
        tokenizer.chat([])
    assert load_tokenizer("gpt2/tokenizer.json").encode("It") == tokenizer.encode("It")
    assert isinstance(load_tokenizer(""), ByteTokenizer) and ByteTokenizer().chat([]) is None
    with pytest.raises(ValueError, match="tokenizer nowhere does not exist"):
        load_tokenizer("nowhere")
    (folder / "gpt2" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer("gpt2")
