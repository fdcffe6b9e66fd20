"""The loss of a checkpoint on held-out data: every window once, to the last row."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxpipe.checkpoint.inherit import tokenizer_of
from jaxpipe.checkpoint.meta import Meta, model_of
from jaxpipe.checkpoint.resume import Start, find, restore
from jaxpipe.checkpoint.store import read_meta
from jaxpipe.config import toml
from jaxpipe.config.run import SCHEMA, Config, from_tables
from jaxpipe.config.sections import MeshConfig
from jaxpipe.data.batches import Batches
from jaxpipe.data.tokenizer import load_tokenizer
from jaxpipe.errors import ConfigError
from jaxpipe.models.build import gpt_model
from jaxpipe.models.gpt_config import GPTConfig
from jaxpipe.runtime.layout.mesh import AXES, simulate_devices
from jaxpipe.runtime.layout.state import StateLayout
from jaxpipe.terminal import Report, Silent
from jaxpipe.train.assemble import assemble

_DECODED = 2**20


@dataclass(frozen=True)
class Score:
    """What a checkpoint achieves on held-out data.

    Attributes:
        checkpoint: Its folder.
        step: Its optimizer steps.
        tokens: How many tokens were predicted.
        loss: Mean cross-entropy, nats per token.
        perplexity: Its exponential.
        bits_per_byte: Per byte of text; None where tokens are no bytes and nobody says how many bytes they stand for.
    """

    checkpoint: str
    step: int
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float | None


def evaluate(
    checkpoint: str,
    overrides: Sequence[str] = (),
    *,
    data: Sequence[str] = (),
    batches: int = 0,
    bytes_per_token: float = 0.0,
    report: Report | None = None,
) -> Score:
    """Measures a checkpoint.

    Args:
        checkpoint: A checkpoint, or a run's folder: then its newest.
        overrides: Changes to the config that the checkpoint carries, such as ``mesh.pipe=1``.
        data: Files to measure on; by default the validation data of the run.
        batches: How many batches; 0 means all.
        bytes_per_token: Bytes that a token stands for on average, for data of token ids whose tokenizer is not known.
        report: Is told what happens.

    Raises:
        CheckpointError: It is missing, damaged or of another model.
        ConfigError: See `jaxpipe.config.run`.
        DataError: See `jaxpipe.data.corpus`.
    """
    report = report or Silent()
    path = find(checkpoint)
    meta = read_meta(path)
    if not isinstance(model_of(meta, path), GPTConfig):
        raise ConfigError(f"{path} is an encoder-decoder, which cannot be measured here; name a checkpoint of a GPT")
    overrides = [f"data.tokenizer={json.dumps(tokenizer_of(path, meta))}", *overrides]
    config = config_of(meta, overrides, data)
    if config.mesh.simulate:
        simulate_devices(config.mesh.simulate)
    config = _fitting(config, len(jax.devices()), report)
    run = assemble(config, gpt_model(config.model))
    for warning in run.data_warnings:
        report.note(f"warning    {warning}")
    params: Any = run.pipe.init(jax.random.key(0), run.val[0])
    layout = StateLayout(run.pipe.layout, {"params": params}, params)
    for leaf in jax.tree.leaves(params):
        leaf.delete()  # room for what comes

    flat, _, _ = restore(Start((path,), weights_only=True), layout, lambda *_: None, report)
    params = layout.unflatten(flat)["params"]
    count = -(-run.val.num_windows // config.train.batch_size)
    count = min(count, batches) if batches else count

    def measure(batch):
        # Auxiliary losses steer the training; they are no part of how well tokens are predicted.
        return float(run.pipe.loss(params, jax.device_put(batch, run.pipe.batch_sharding), parts=True).head)

    loss, tokens = mean_loss(run.val, count, measure)
    bytes_per_token = bytes_per_token or _bytes_per_token(config, run.val)
    return Score(
        checkpoint=str(path),
        step=meta.step,
        tokens=tokens,
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=loss / math.log(2) / bytes_per_token if bytes_per_token else None,
    )


def _bytes_per_token(config: Config, batches: Batches) -> float:
    """How many bytes of text a token stands for, by the first million tokens of each segment; 0 where nobody knows."""
    if config.data.unit == "byte":
        return 1.0
    if not config.data.tokenizer:
        return 0.0
    tokenizer = load_tokenizer(config.data.tokenizer)
    parts = [segment.ids[:_DECODED].tolist() for segment in batches.segments]
    return sum(len(tokenizer.decode(part).encode()) for part in parts) / sum(map(len, parts))


def mean_loss(batches: Batches, count: int, measure: Callable[[dict[str, Any]], float]) -> tuple[float, int]:
    """The mean loss per token of the first windows, each counted once.

    Args:
        batches: The data.
        count: Batches to measure; the rows of the last one that windows do not fill are masked out.
        measure: ``batch -> mean loss`` of a batch with a mask.

    Returns:
        The loss and the number of tokens.
    """
    total, tokens, rows = 0.0, 0, batches.batch_size
    for number in range(count):
        real = min(rows, batches.num_windows - number * rows)
        mask = np.zeros((rows, batches.seq_len), np.float32)
        mask[:real] = 1.0
        total += measure({**batches[number], "mask": mask}) * real * batches.seq_len
        tokens += real * batches.seq_len
    return total / tokens, tokens


def config_of(meta: Meta, overrides: Sequence[str] = (), data: Sequence[str] = ()) -> Config:
    """The config that a checkpoint carries, with overrides and other validation files on top."""
    written = {name: {key: v for key, v in table.items() if v is not None} for name, table in meta.config.items()}
    tables = toml.check(written, SCHEMA)
    own = dict(tables.get("data", {}))
    if data:
        own["source"] = "text" if own.get("source") == "stdlib" else own.get("source")
        own["train"], own["val"] = tuple(data), tuple(data)
    tables = toml.override({**tables, "data": own}, overrides, SCHEMA)
    return from_tables(tables)


def _fitting(config: Config, devices: int, report: Report) -> Config:
    """The config on a mesh that there is: its own, or else one device."""
    sizes = [getattr(config.mesh, axis) for axis in AXES]
    if math.prod(sizes) <= devices:
        return config
    report.note(f"devices    {math.prod(sizes)} are not there; measuring on one")
    try:
        mesh = MeshConfig(simulate=config.mesh.simulate)
        plain: Any = {"stages": "", "remat": "full", "packing": "auto", "memory": "ideal"}
        schedule = replace(config.schedule, name="1f1b", repeats=1, **plain)
        return replace(config, mesh=mesh, schedule=schedule)
    except ConfigError as error:
        raise ConfigError(f"{error}; or run on {math.prod(sizes)} devices") from error
