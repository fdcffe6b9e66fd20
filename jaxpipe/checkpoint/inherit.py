"""What a run takes over from the checkpoint that it starts from, where its config does not say: model and tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from jaxpipe.checkpoint.meta import Meta, model_of
from jaxpipe.checkpoint.resume import find
from jaxpipe.checkpoint.store import read_meta
from jaxpipe.config.run import Config, from_tables, read
from jaxpipe.data.tokenizer import FILE, copy_tokenizer
from jaxpipe.errors import CheckpointError, ConfigError
from jaxpipe.models.gpt_config import GPTConfig

TOKENIZER = "tokenizer"
"""The folder of a run that takes the tokenizer's files."""
SIZES = {"preset", "num_layers", "num_heads", "d_model"}
"""Keys of which a section `[model]` that describes a whole model has one."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a run from a TOML file, with `section.key=value` overrides on top.

    A run that starts from a checkpoint takes over what its own sections leave out, see `inherit`.

    Raises:
        ConfigError: See `jaxpipe.config.toml` and the sections.
        CheckpointError: What it takes over is not there.
    """
    tables = read(path, overrides)
    start = tables.get("checkpoint", {})
    name = start.get("init_from") or start.get("resume", "auto")
    return from_tables(tables if name in ("auto", "never", "") else inherit(tables, name))


def inherit(tables: dict[str, dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    """Sections of a config with what they leave out and the checkpoint has.

    A section `[model]` without sizes takes the model of the checkpoint, changed key by key. Text is read by the
    tokenizer of the checkpoint, unless ``data.tokenizer`` says otherwise.

    Args:
        tables: Checked sections.
        name: A checkpoint, or a run's folder.

    Raises:
        CheckpointError: The model is to come from there, and there is none.
        ConfigError: It is an encoder-decoder, which runs cannot train.
    """
    model, data = tables.get("model", {}), tables.get("data", {})
    whole = bool(SIZES & set(model))
    try:
        path = find(name)
        meta = read_meta(path)
    except CheckpointError as error:
        if whole:
            return tables  # told when the run looks for its start
        raise CheckpointError(f"{error}; or give [model] its sizes") from error
    if not whole:
        if not isinstance(model_of(meta, path), GPTConfig):
            raise ConfigError(
                f"checkpoint.init_from={name!r} is an encoder-decoder, which `jaxpipe train` cannot train"
            )
        model = {**{key: value for key, value in meta.config["model"].items() if value is not None}, **model}
    if "tokenizer" not in data and data.get("source") != "tokens" and (found := tokenizer_of(path, meta)):
        data = {**data, "tokenizer": found}
    return {**tables, "model": model, "data": data}


def keep_tokenizer(source: str, run: Path) -> None:
    """Copies a tokenizer into a run's folder, whose checkpoints are no use without it.

    Raises:
        OSError: The folder cannot be written.
    """
    own = run / TOKENIZER
    folder = Path(source).parent if Path(source).name == FILE else Path(source)
    if folder.resolve() != own.resolve():
        copy_tokenizer(folder, own, "config.json")


def tokenizer_of(path: epath.Path, meta: Meta) -> str:
    """The folder of a checkpoint's tokenizer: beside the checkpoints, else where its config says; empty for none."""
    for folder in (path, path.parent, path.parent.parent):
        if (folder / TOKENIZER / FILE).exists():
            return str(folder / TOKENIZER)
    return meta.config.get("data", {}).get("tokenizer") or ""
