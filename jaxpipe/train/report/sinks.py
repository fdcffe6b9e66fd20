"""Numbers to TensorBoard and to Weights & Biases, where their packages are installed and the config asks for them."""

import uuid
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from jaxpipe.checkpoint.folder import RunFolder
from jaxpipe.config.run import Config
from jaxpipe.documents import read_text
from jaxpipe.errors import ConfigError
from jaxpipe.train.report.metrics import Sink


class TensorBoard:
    """Event files for TensorBoard.

    Args:
        folder: Takes them; a run that goes on adds a file.
    """

    def __init__(self, folder: Path):
        self._writer = _package("tensorboardX", "metrics.tensorboard", "tensorboard").SummaryWriter(str(folder))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases; a run that goes on is the same one there.

    Args:
        project: Its project.
        folder: The run's folder.
        config: The run's sections.
    """

    def __init__(self, project: str, folder: RunFolder, config: dict[str, Any]):
        package = _package("wandb", "metrics.wandb", "wandb")
        if not folder.wandb_id.exists():
            folder.write(folder.wandb_id, uuid.uuid4().hex)
        own = read_text(folder.wandb_id, ConfigError, most=1000).strip()
        where, name = str(folder.path), folder.path.name
        self._run = package.init(project=project, name=name, id=own, resume="allow", dir=where, config=config)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


def check_sinks(config: Config) -> None:
    """Checks that what the config asks for is installed.

    Raises:
        ConfigError: It is not.
    """
    if config.metrics.tensorboard:
        _package("tensorboardX", "metrics.tensorboard", "tensorboard")
    if config.metrics.wandb:
        _package("wandb", "metrics.wandb", "wandb")


def open_sinks(config: Config, folder: RunFolder, sections: dict[str, Any]) -> Sequence[Sink]:
    """What the config asks for.

    Args:
        config: The run.
        folder: Its folder.
        sections: The resolved config.

    Raises:
        ConfigError: A package is not installed.
    """
    sinks: list[Sink] = []
    if config.metrics.tensorboard:
        sinks.append(TensorBoard(folder.path / "tensorboard"))
    if config.metrics.wandb:
        sinks.append(WeightsAndBiases(config.metrics.wandb_project, folder, sections))
    return sinks


def _package(name: str, key: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(f"{key}=true needs the package {name}; try pip install 'jaxpipe[{extra}]'") from error
