"""Numbers to TensorBoard and Weights & Biases."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxpipe.checkpoint.folder import RunFolder
from jaxpipe.config.run import Config
from jaxpipe.config.sections import MetricsConfig, TrainConfig
from jaxpipe.errors import ConfigError
from jaxpipe.models.gpt import PRESETS
from jaxpipe.train.report.metrics import MetricsLog
from jaxpipe.train.report.sinks import check_sinks, open_sinks


def config(**keys) -> Config:
    return Config(model=PRESETS["tiny"], train=TrainConfig(seq_len=64), metrics=MetricsConfig(**keys))


def write(folder: Path, run: Config):
    log = MetricsLog(
        folder / "metrics.jsonl", sinks=open_sinks(run, RunFolder(folder, overwrite=True), {"model": {"d_model": 8}})
    )
    log.write(step=1, loss=2.0, lr=0.1)
    log.write(step=1, event="spike", loss=9.0, mean=2.0)
    log.close()


def test_tensorboard_gets_event_files(tmp_path):
    pytest.importorskip("tensorboardX")
    write(tmp_path, config(tensorboard=True))
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in file.read_bytes()


def test_weights_and_biases_gets_numbers_of_one_run_however_often_it_goes_on(tmp_path, monkeypatch):
    calls: list[Any] = []
    run = SimpleNamespace(log=calls.append, finish=lambda: calls.append("finish"))
    fake: Any = SimpleNamespace(init=lambda **words: calls.append(words) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    write(tmp_path, config(wandb=True, wandb_project="mine"))
    write(tmp_path, config(wandb=True, wandb_project="mine"))
    first, numbers, end, second, *_ = calls
    assert (first["project"], first["resume"], first["config"]) == ("mine", "allow", {"model": {"d_model": 8}})
    assert second == first
    assert (numbers, end) == ({"loss": 2.0, "lr": 0.1, "step": 1}, "finish")


@pytest.mark.parametrize(("key", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_package_that_is_missing_is_told_before_the_run(key, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"metrics\.{key}=true needs the package {package}; try pip install"):
        check_sinks(config(**{key: True}))
