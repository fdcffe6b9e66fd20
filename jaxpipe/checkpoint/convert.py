"""From a folder of Hugging Face to a checkpoint, and back.

A converted folder looks like a run's: ``checkpoints/0`` with the weights, and ``tokenizer`` with the tokenizer's files.
What is written appears under its name only when it is whole.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpipe.checkpoint.inherit import TOKENIZER, tokenizer_of
from jaxpipe.checkpoint.later import Later, write_checkpoint
from jaxpipe.checkpoint.meta import Meta, model_of
from jaxpipe.checkpoint.resume import find
from jaxpipe.checkpoint.store import read_meta
from jaxpipe.checkpoint.weights import (
    DTYPES,
    HFWeights,
    ModelConfig,
    checkpoint_leaves,
    open_hf,
    read_checked,
)
from jaxpipe.config.run import Config
from jaxpipe.config.sections import DataConfig, TrainConfig
from jaxpipe.data.tokenizer import copy_tokenizer
from jaxpipe.documents import read_object
from jaxpipe.errors import CheckpointError, ConfigError
from jaxpipe.models.gpt_config import GPTConfig
from jaxpipe.models.hf import config_json, family_for, leaf_shapes, write_shards
from jaxpipe.models.hf.facts import CARRIED
from jaxpipe.runtime.layout.checksum import as_text, host_checksum
from jaxpipe.runtime.layout.tree import set_path
from jaxpipe.terminal import Report, Silent

CHECKPOINTS, CONFIG = "checkpoints", "config.json"
MAX_SHARD_BYTES = 5 * 10**9


def from_hf(path: str | Path, out: str | Path, *, dtype: str | None = None, report: Report | None = None) -> Path:
    """Makes a checkpoint of a Hugging Face folder, holding one leaf at a time.

    Args:
        path: The folder.
        out: The folder to make: like a run's, for ``init_from``, `jaxpipe eval` and `jaxpipe generate`.
        dtype: That weights are cast to; by default they stay what they are.
        report: Is told what happens.

    Returns:
        The folder.

    Raises:
        ConfigError: The folder is none, its model is none of ours, or `out` is taken.
        DataError: Its files are damaged or do not fit its config.
    """
    report, out = report or Silent(), Path(out)
    with _appears(out) as made:
        cfg, weights = open_hf(path, dtype)
        report.note(f"model      {_described(cfg, weights.shapes)}")
        found = copy_tokenizer(path, made / TOKENIZER, CONFIG)
        report.note(f"tokenizer  {found or f'none: {path} has no files of one'}")
        config = _config(cfg, str(out / TOKENIZER) if found else "")
        _write(weights, made / CHECKPOINTS / "0", config)
    report.note(f"done       {out}")
    return out


def _write(weights: HFWeights, path: Path, config: dict[str, dict[str, Any]]) -> None:
    """Writes the checkpoint of step 0."""
    entries, tree = {}, {}

    def make(leaf) -> np.ndarray:
        array = weights.part(leaf)
        entry = {"shape": list(array.shape), "dtype": str(array.dtype), "sum": as_text(host_checksum(array))}
        entries[f"params/{leaf.path}"] = entry
        return array

    def describe() -> Meta:
        key = [int(word) for word in np.asarray(jax.random.key_data(jax.random.key(0)))]
        facts: dict[str, Any] = {"step": 0, "row": 0, "time": time.time(), "loss": None, "val_loss": None, "key": key}
        return Meta(**facts, data={}, config=config, mesh={}, schedule="converted", leaves=entries)

    for leaf in weights.table:
        later = Later(weights.shapes[leaf.path], weights.dtype, lambda own=leaf: make(own))
        tree = set_path(tree, f"params/{leaf.path}", later)
    path.parent.mkdir(parents=True)
    write_checkpoint(path, tree, describe)


def _config(cfg: ModelConfig, tokenizer: str) -> dict[str, dict[str, Any]]:
    """What the checkpoint says of its run: the model, and the text that it reads."""
    if not isinstance(cfg, GPTConfig):
        return {"model": asdict(cfg), "data": {"tokenizer": tokenizer}}
    data = DataConfig(tokenizer=tokenizer) if tokenizer else DataConfig(source="tokens", train=("*.bin",))
    run = Config(
        model=cfg,
        data=data,
        train=TrainConfig(batch_size=8, seq_len=min(cfg.max_seq_len, 1024)),
    )
    plain = {name: {k: list(v) if isinstance(v, tuple) else v for k, v in t.items()} for name, t in asdict(run).items()}
    return plain


def to_hf(
    checkpoint: str,
    out: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: str | Path | None = None,
    report: Report | None = None,
) -> Path:
    """Makes a Hugging Face folder of a checkpoint, holding one leaf and one shard at a time.

    Args:
        checkpoint: A checkpoint, or a run's folder: then its newest.
        out: The folder to make.
        dtype: That weights are cast to; by default they stay what they are.
        max_shard_bytes: Size of one file of weights.
        tokenizer: A folder whose tokenizer goes along; by default the run's.
        report: Is told what happens.

    Returns:
        The folder.

    Raises:
        CheckpointError: It is missing or damaged.
        ConfigError: The model is of no architecture of theirs, or `out` is taken.
    """
    if dtype is not None and dtype not in (*DTYPES, "float16"):
        raise ConfigError(f"--dtype {dtype!r} must be one of {', '.join(DTYPES)}, float16; try 'float32'")
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes={max_shard_bytes} must be at least 1; try {MAX_SHARD_BYTES}")
    report, out = report or Silent(), Path(out)
    path = find(checkpoint)
    meta = read_meta(path)
    cfg = model_of(meta, path)
    family = family_for(cfg)
    shapes = leaf_shapes(cfg)
    leaves = {"/".join(leaf.path[1:]): leaf for leaf in checkpoint_leaves(meta, _on_cpu())}
    table = family.table(cfg)
    for leaf in table:
        if leaf.path not in leaves or leaves[leaf.path].shape != shapes[leaf.path]:
            raise CheckpointError(f"{path}: its {leaf.path} is not that of the model in its description")
    source = tokenizer_of(path, meta) if tokenizer is None else str(tokenizer)
    with _appears(out) as made:
        found = copy_tokenizer(source, made) if source else None
        if tokenizer is not None and not found:
            raise ConfigError(
                f"tokenizer {tokenizer} has no files of one; name the folder of a tokenizer, or leave it out"
            )
        report.note(f"model      {_described(cfg, shapes)}\ntokenizer  {found or 'none'}")
        to = dtype or str(leaves[table[0].path].dtype)
        tensors = [each for leaf in table for each in leaf.tensors(shapes[leaf.path])]
        arrays = read_checked(path, meta, [leaves[leaf.path] for leaf in table])
        parts = (part for leaf, (_, array) in zip(table, arrays, strict=True) for part in leaf.give(np.asarray(array)))
        write_shards(made, tensors, parts, dtype=np.dtype(to), max_bytes=max_shard_bytes)
        keys = {**config_json(cfg), "torch_dtype": to, **_carried(source)}
        (made / CONFIG).write_text(json.dumps(keys, indent=2) + "\n", encoding="utf-8")
    report.note(f"done       {out}")
    return out


def _carried(source: str) -> Mapping[str, Any]:
    """The ids of special tokens, which our configs do not have, from the config that came with the tokenizer."""
    file = Path(source) / CONFIG
    if not source or not file.is_file():
        return {}
    table = read_object(file, ConfigError)
    return {key: table[key] for key in CARRIED if key in table}


def _on_cpu():
    rests = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    return lambda shape: rests


def _described(cfg: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> str:
    count = sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
    return f"{family_for(cfg).architecture}, {count:,} parameters, {cfg.param_dtype}"


@contextmanager
def _appears(out: Path) -> Iterator[Path]:
    """A folder to write to that takes its name when all is written, and is gone where that fails.

    Raises:
        ConfigError: The name is taken, or the folder cannot be written.
    """
    if "://" in str(out):
        raise ConfigError(f"{out} must be on a local disk; convert there and copy it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already and is not empty; name another folder, or delete it")
    made = out.parent / f".{out.name}.{os.getpid()}.part"
    try:
        made.mkdir(parents=True)
        yield made.absolute()
        made.rename(out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
