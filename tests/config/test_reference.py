"""The reference of keys: complete, true to the sections, and the page in docs is it."""

from pathlib import Path

import pytest

from jaxpipe.cli.main import main
from jaxpipe.config import toml
from jaxpipe.config.reference import keys, markdown, text
from jaxpipe.config.run import SCHEMA
from jaxpipe.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_every_key_is_there_with_a_meaning():
    found = list(keys())
    assert [(key.section, key.name) for key in found] == [(s, k) for s, table in SCHEMA.items() for k in table]
    assert all(len(key.meaning) > 1 and key.kind and key.default for key in found)


def test_defaults_are_those_of_an_empty_section():
    defaults = {f"{key.section}.{key.name}": key.default for key in keys()}
    assert defaults["optim.warmup_steps"] == "`100`" and defaults["train.out"] == '`"runs/train"`'
    assert defaults["model.num_layers"].startswith("must be given") and defaults["data.train"] == "`[]`"


def test_bounds_are_those_that_the_sections_keep():
    kinds = {f"{key.section}.{key.name}": key.kind for key in keys()}
    assert kinds["train.steps"] == "whole number ≥ 1" and kinds["train.eval_every"] == "whole number ≥ 0"
    assert kinds["optim.eps"] == "number > 0" and kinds["optim.beta1"] == "number ≥ 0 and < 1"
    assert kinds["gpu.memory_fraction"] == "number > 0 and ≤ 1" and kinds["data.train"] == "list of strings"
    assert kinds["model.dropout"] == "number ≥ 0 and < 1" and kinds["model.num_layers"] == "whole number ≥ 1"


def test_the_page_in_docs_is_what_the_command_prints(capsys):
    assert main(["config", "keys", "--markdown"]) == 0
    assert capsys.readouterr().out == markdown() == (ROOT / "docs" / "config.md").read_text()


def test_help_config_prints_them_and_exits_0(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help-config"])
    assert stopped.value.code == 0 and "optim.final_learning_rate" in capsys.readouterr().out


def test_one_section_or_one_key():
    assert text(["train.steps"]).splitlines()[0] == "[train]" and "train.seed" not in text(["train.steps"])
    assert {line.split(".")[0].strip() for line in text(["gpu"]).splitlines() if line.startswith("  gpu")} == {"gpu"}
    with pytest.raises(ConfigError, match=r"unknown key optm; did you mean the section optim\?"):
        text(["optm"])
    with pytest.raises(ConfigError, match=r"unknown key train.stepz; did you mean train.steps\?"):
        text(["train.stepz"])


def test_show_gives_a_file_that_is_the_same_run_and_check_says_what_it_is(capsys, tmp_path):
    file = str(ROOT / "configs" / "quickstart.toml")
    assert main(["config", "show", file, "train.steps=7"]) == 0
    written = tmp_path / "whole.toml"
    written.write_text(capsys.readouterr().out)
    assert "steps = 7" in written.read_text() and "final_learning_rate" in written.read_text()
    assert main(["config", "check", str(written)]) == 0
    assert "7 steps of 16 sequences of 128 on 4 devices" in capsys.readouterr().out
    assert main(["config", "check", file, "train.stepz=7"]) == 2
    assert "did you mean train.steps?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("train.grad_clip", "did you mean optim.clip_norm?"),
        ("optim.lr", "did you mean optim.learning_rate?"),
        ("train.gradient_accumulation_steps", "did you mean schedule.microbatches?"),
        ("model.hidden_size", "did you mean model.d_model?"),
        ("mesh.microbatches", "did you mean schedule.microbatches?"),
        ("optim.name", "[optim] has learning_rate, final_learning_rate"),
        ("optim.schedule", "[optim] has learning_rate, final_learning_rate"),
    ],
)
def test_keys_of_other_programs_are_understood(wrong, near):
    with pytest.raises(ConfigError) as refused:
        toml.find(wrong, SCHEMA)
    assert near in str(refused.value)


def test_every_key_meant_exists():
    assert all(toml.find(key, SCHEMA) for key in toml.MEANT)
    assert not [name for name in toml.LISTED if name.split(".")[1] in SCHEMA["optim"]]
