"""What several tests share: a small model of plain functions, tree comparison, and pairwise covering sets."""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import jaxpipe as jp
from jaxpipe.models.build import targets
from jaxpipe.ops.losses import cross_entropy
from jaxpipe.schedule import build

TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 2e-2, "int32": 0}
"""Largest error of a leaf over its largest entry, by dtype."""

QUICK: Any = {"xla_backend_optimization_level": 0}
"""Compiler options for what is compiled once and run once."""

WIDTH, VOCAB, LENGTH = 8, 12, 5
ROWS = 2


def tree_allclose(actual: Any, expected: Any) -> None:
    """Asserts equal structure, dtypes and shapes, and values equal to `TOLERANCE`."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{name}: {a.dtype}{a.shape} != {b.dtype}{b.shape}"
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
        assert error <= TOLERANCE[str(actual_dtype(path, expected))], f"{name}: relative error {error:.2e}"


def actual_dtype(path, tree) -> Any:
    """The dtype of the leaf at a path."""
    for key in path:
        tree = tree[getattr(key, "key", getattr(key, "idx", None))]
    return tree.dtype


def toy_model(
    layers: int, dropout: float = 0.0, tied: bool = False, dtype: str = "float32", width: int = WIDTH
) -> jp.Model:
    """A residual network of plain functions with two products per block, dropout in all parts, and a masked loss."""

    def normal(key, *shape):
        return 0.4 * jax.random.normal(key, shape, dtype)

    def drop(x, key):
        if key is None or not dropout:
            return x
        return jnp.where(jax.random.bernoulli(key, 1 - dropout, x.shape), x / (1 - dropout), 0)

    def block_init(key, carry):
        up, down = jax.random.split(key)
        scale = jnp.ones(width, dtype)
        return {"up": normal(up, width, 2 * width), "down": normal(down, 2 * width, width), "scale": scale}

    def block(p, x, mb, key):
        return x + drop(jnp.tanh((x * p["scale"][None, None]) @ p["up"]) @ p["down"], key)

    def head_init(key, carry, mb):
        return {"kernel": normal(key, VOCAB, width), "out": {"bias": jnp.zeros(VOCAB, dtype)}}

    def head(p, x, mb, key):
        logits = jax.nn.log_softmax(drop(x, key) @ p["kernel"].T + p["out"]["bias"][None, None])
        ce = -jnp.take_along_axis(logits, mb["targets"][..., None], -1)[..., 0]
        mask = mb["mask"].astype(ce.dtype)
        return (ce * mask).sum(), mask.sum()

    columns, rows = PartitionSpec(None, "tensor"), PartitionSpec("tensor")
    return jp.Model(
        jp.Embed(
            lambda key, mb: {"table": normal(key, VOCAB, width)},
            lambda p, mb, key: drop(p["table"][mb["tokens"]], key),
            specs={"table": rows},
        ),
        [jp.Block(block_init, block, specs={"up": columns, "down": rows})] * layers,
        jp.HeadLoss(head_init, head, specs={"kernel": rows, "out": {"bias": rows}}),
        tie={"head/kernel": "embed/table"} if tied else {},
    )


def toy_batch(rows: int, length: int = LENGTH) -> dict[str, np.ndarray]:
    """Random tokens, targets, and a mask that keeps a different share of every row."""
    rng = np.random.default_rng(rows)
    tokens, targets = rng.integers(0, VOCAB, (2, rows, length), dtype=np.int32)
    mask = (np.arange(length)[None] <= np.arange(rows)[:, None] % length).astype(np.float32)
    return {"tokens": tokens, "targets": targets, "mask": mask}


def toy_pipeline(
    name: str,
    devices: int,
    microbatches: int,
    repeats: int = 1,
    *,
    blocks: int = 1,
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    shard: Any = "params",
    remat: Any = "full",
    memory: Any = "ideal",
    dropout: float = 0.0,
    tied: bool = False,
    dtype: str = "float32",
    width: int = WIDTH,
) -> jp.Pipeline:
    """The toy model with so many blocks per stage on a mesh of the first devices."""
    model = toy_model(blocks * devices * repeats, dropout, tied, dtype, width)
    schedule = build(name, devices=devices, microbatches=microbatches, repeats=repeats)
    mesh = jp.make_mesh(devices, data, fsdp, tensor)
    return jp.Pipeline(model, schedule=schedule, mesh=mesh, remat=remat, memory=memory, shard=shard)


@cache
def toy_canonical(layers: int, tied: bool, dtype: str) -> Any:
    """Canonical parameters of the toy model."""
    return jp.sequential(toy_model(layers, 0.0, tied, dtype)).init(jax.random.key(0), toy_batch(ROWS))


@cache
def toy_oracle(layers: int, row_groups: int, dropout: float, tied: bool, dtype: str) -> tuple[Any, Any, Any]:
    """``(canonical, loss, grads)`` of the unpipelined toy model on the standard batch and keys."""
    oracle = jp.sequential(toy_model(layers, dropout, tied, dtype), row_groups=row_groups)
    canonical = toy_canonical(layers, tied, dtype)
    key = jax.random.key(1) if dropout else None
    step = jax.jit(oracle.value_and_grad, compiler_options=QUICK)
    loss, grads = step(canonical, toy_batch(ROWS * row_groups), key)
    return canonical, loss, grads


def token_loss(logits: Any, mb: Any) -> tuple[Any, Any]:
    """Sum and weight of the next-token loss of whole logits."""
    return cross_entropy(logits, *targets(mb))[:2]


def turned(x: np.ndarray, base: float, stretched: Any = None) -> np.ndarray:
    """Rotary positions in numbers that turn in the complex plane: rows [T, d], dims i and i + d/2 a pair."""
    half = x.shape[1] // 2
    frequencies = [base ** (-i / half) for i in range(half)]
    angles = np.arange(len(x))[:, None] * np.array([stretched(f) if stretched else f for f in frequencies])[None]
    pairs = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([pairs.real, pairs.imag], axis=1)


def pairwise(factors: Mapping[str, Sequence], legal: Any, seed: int = 0, pool: int = 400) -> Iterator[dict]:
    """Cases in which every legal pair of factor values occurs, chosen greedily from random legal ones.

    Args:
        factors: The values of each factor.
        legal: ``case -> bool``.
        seed: Of the candidates.
        pool: Candidates per choice.
    """
    everything = [
        case
        for values in itertools.product(*factors.values())
        if legal(case := dict(zip(factors, values, strict=True)))
    ]
    pairs = [set(itertools.combinations(case.items(), 2)) for case in everything]
    missing = set().union(*pairs)
    rng = random.Random(seed)
    while missing:
        sample = rng.sample(range(len(everything)), min(pool, len(everything)))
        best = max(sample, key=lambda at: len(pairs[at] & missing))
        if gained := pairs[best] & missing:
            missing -= gained
            yield everything[best]
