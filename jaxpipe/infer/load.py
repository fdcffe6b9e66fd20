"""A model to generate with, from whatever a user has: a run's folder, a checkpoint, or a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxpipe.checkpoint.inherit import tokenizer_of
from jaxpipe.checkpoint.meta import ModelConfig, model_of
from jaxpipe.checkpoint.resume import find
from jaxpipe.checkpoint.store import read_meta
from jaxpipe.checkpoint.weights import open_hf, over, read_weights
from jaxpipe.data.tokenizer import has_tokenizer
from jaxpipe.errors import CheckpointError, ConfigError
from jaxpipe.infer.serving.text import ByteTokenizer, Tokenizer, load_tokenizer
from jaxpipe.models.hf.files import CONFIG
from jaxpipe.runtime.layout.mesh import make_mesh
from jaxpipe.runtime.layout.tree import Tree


@dataclass(frozen=True)
class Loaded:
    """A model with its weights.

    Attributes:
        cfg: Of a GPT or an encoder-decoder.
        canonical: The weights, on the mesh.
        tokenizer: The model's own, or bytes.
    """

    cfg: ModelConfig
    canonical: Tree
    tokenizer: Tokenizer


def load_model(
    path: str | Path, *, mesh: Mesh | None = None, dtype: str | None = None, tokenizer: str | Path | None = None
) -> Loaded:
    """Loads a model, leaf by leaf, each device its own part.

    Args:
        path: A checkpoint, a run's folder (then its newest checkpoint), or a Hugging Face folder.
        mesh: What weights are spread over; by default all devices, by their first dim that divides.
        dtype: Of weights and computation for a Hugging Face folder; by default its own, and float32 for float16.
        tokenizer: A folder with a tokenizer's files, or ``bytes``; by default the model's own.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged.
        ConfigError: A folder whose model or tokenizer is none of ours.
        DataError: Its files are damaged.
    """
    mesh = make_mesh(pipe=len(jax.devices())) if mesh is None else mesh
    if (Path(path) / CONFIG).is_file():
        cfg, weights = open_hf(path, dtype, otherwise="float32")
        own = tokenizer or (path if has_tokenizer(path) else "")
        return Loaded(cfg, weights.tree(over(mesh)), _tokenizer(own, cfg, path))
    try:
        found = find(str(path))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or a Hugging Face folder, which has a {CONFIG}") from error
    if dtype is not None:
        raise ConfigError(f"dtype={dtype!r} is for Hugging Face folders; a checkpoint's weights stay what they are")
    meta = read_meta(found)
    cfg = model_of(meta, found)
    own = tokenizer or tokenizer_of(found, meta)
    if not own and meta.config.get("data", {}).get("source") in ("stdlib", "text"):
        own = BYTES
    return Loaded(cfg, read_weights(found, meta, over(mesh)), _tokenizer(own, cfg, path))


BYTES = "bytes"


def _tokenizer(path: str | Path, cfg: ModelConfig, where: str | Path) -> Tokenizer:
    """A model's tokenizer.

    Raises:
        ConfigError: It makes tokens that the model does not have, or there is none and the model's are no bytes.
    """
    if path == BYTES or (not path and cfg.vocab_size == ByteTokenizer.vocab_size):
        return ByteTokenizer()
    if not path:
        raise ConfigError(
            f"{where} has no tokenizer, and its model's {cfg.vocab_size} tokens are no bytes; "
            "put the tokenizer's files there, such as tokenizer.json"
        )
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ConfigError(
            f"tokenizer {path} has {tokenizer.vocab_size} tokens but the model {cfg.vocab_size}; try the model's own"
        )
    return tokenizer
