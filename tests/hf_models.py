"""What tests of converted weights share: a model's logits, loss and gradients by their names of tensors."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import QUICK

from jaxpipe.checkpoint.weights import HFWeights
from jaxpipe.models.build import encdec_model, gpt_model
from jaxpipe.models.gpt_config import GPTConfig
from jaxpipe.models.hf import config_json, family_for, leaf_shapes, write_shards
from jaxpipe.ops.products import vocab_logits
from jaxpipe.runtime.layout.tree import get_path, tie
from jaxpipe.runtime.model import Model, carry_and_aux

CPU = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def model_of(cfg: Any) -> Model:
    """The model of a config, with its loss."""
    return gpt_model(cfg) if isinstance(cfg, GPTConfig) else encdec_model(cfg)


def answer(cfg: Any, weights: HFWeights, batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """Logits, loss and gradients of a folder's weights, the gradients by ``grad`` and the name of the tensor."""
    canonical, model = weights.tree(lambda shape: CPU), model_of(cfg)

    def loss_and_logits(canonical):
        found = logits(model, canonical, batch)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(found, batch["targets"])), found

    both = jax.jit(jax.value_and_grad(loss_and_logits, has_aux=True)).lower(canonical)
    (loss, found), grads = both.compile(compiler_options=QUICK)(canonical)
    by_name = {}
    for leaf in weights.table:
        names = [name for name, _ in leaf.tensors(weights.shapes[leaf.path])]
        by_name |= dict(zip(names, leaf.give(np.asarray(get_path(grads, leaf.path))), strict=True))
    return {"logits": found, "loss": loss, **{f"grad {name}": grad for name, grad in by_name.items()}}


def logits(model: Model, canonical: Any, batch: dict[str, Any]) -> jax.Array:
    """The logits with no pipeline, block by block."""
    carry, seen = model.embed.apply(canonical["embed"], batch, None), {}
    for block in model.blocks:
        row = seen[block.kind] = seen.get(block.kind, -1) + 1
        params = jax.tree.map(lambda leaf, row=row: leaf[row], canonical["blocks"][block.kind])
        params = tie(params, canonical["embed"], model.block_tie(block.kind))
        carry = carry_and_aux(carry, block.apply(params, carry, batch, None))[0]
    head = tie(canonical["head"], canonical["embed"], model.head_tie)
    return vocab_logits(head["kernel"], model.head_loss.features(head, carry, batch, None))


def write_folder(path: Path, cfg: Any, *, dtype: Any = np.float32, max_bytes: int = 10**9) -> dict[str, np.ndarray]:
    """Writes a folder as Hugging Face has it, with random weights, and returns them."""
    import json

    path.mkdir(parents=True)
    random, shapes = np.random.default_rng(0), leaf_shapes(cfg)
    tensors = [each for leaf in family_for(cfg).table(cfg) for each in leaf.tensors(shapes[leaf.path])]
    arrays = [np.asarray(random.normal(0, 0.1, shape), dtype) for _, shape in tensors]
    write_shards(path, tensors, arrays, dtype=dtype, max_bytes=max_bytes)
    (path / "config.json").write_text(json.dumps(config_json(cfg)))
    return {name: array for (name, _), array in zip(tensors, arrays, strict=True)}


def close(found: Any, expected: Any, tolerance: float) -> None:
    """Asserts equality to a tolerance, relative to the largest entry."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * max(np.abs(expected).max(), 1.0)


def as_jax(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of numpy arrays or of torch's, without what is no input."""
    return {name: jnp.asarray(np.asarray(array)) for name, array in batch.items()}
