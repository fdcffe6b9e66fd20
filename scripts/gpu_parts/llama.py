"""The model of the checks: a Llama in plain functions, and its training step with no pipeline.

Plain functions, so that no part but generation needs flax. Shape legend: B rows, T positions, D width, H heads, d dims
of a head, F hidden dims, V vocabulary.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jaxpipe as jp


@dataclass(frozen=True)
class Size:
    """What the model is made of.

    Attributes:
        width: D.
        heads: H.
        hidden: F.
        vocab: V.
        length: T.
        dtype: Of parameters and computation.
        fused: Whether attention is the fused kernel of NVIDIA GPUs.
    """

    width: int
    heads: int
    hidden: int
    vocab: int
    length: int
    dtype: str = "bfloat16"
    fused: bool = True

    @property
    def block_params(self) -> int:
        """Weights of a block's matrices."""
        return 4 * self.width**2 + 3 * self.width * self.hidden

    def step_flops(self, layers: int, sequences: int) -> float:
        """Operations of the products of a training step, nothing computed twice; attention counts its causal half."""
        block = 2 * self.block_params + 2 * self.length * self.width
        forward = layers * block + 2 * self.width * self.vocab
        return 3.0 * forward * sequences * self.length


def model(size: Size, layers: int) -> jp.Model:
    """A decoder with RMS norms, rotary positions, SwiGLU and a head of its own."""
    block = jp.Block(partial(_init_block, size), partial(_block, size))
    return jp.Model(
        jp.VocabEmbed(
            init=lambda key, mb: {"table": _normal(key, size, size.vocab, size.width)},
            table="table",
            tokens=lambda mb: mb["tokens"],
            finish=lambda p, rows, mb, key: rows,
        ),
        [block] * layers,
        head(size),
    )


def head(size: Size) -> jp.VocabHead:
    """The last norm, and the cross entropy as the package computes it."""
    return jp.VocabHead(
        init=lambda key, carry, mb: {
            "norm": jnp.ones(size.width, size.dtype),
            "kernel": _normal(key, size, size.vocab, size.width),
        },
        kernel="kernel",
        features=lambda p, x_BTD, mb, key: rms_norm(x_BTD, p["norm"]),
        targets=lambda mb: (mb["targets"], jnp.ones(mb["targets"].shape, jnp.float32)),
    )


def batch_shapes(size: Size, sequences: int, sharding: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch."""
    tokens = jax.ShapeDtypeStruct((sequences, size.length), jnp.int32, sharding=sharding)
    return {"tokens": tokens, "targets": tokens}


def plain_step(model: jp.Model, remat: str, microbatches: int):
    """``(params, batch) -> (loss, gradients)`` as one writes it without a pipeline: a scan over microbatches.

    Args:
        model: The model.
        remat: ``full`` recomputes each stage from its input, ``none`` keeps what JAX keeps.
        microbatches: M.

    Returns:
        A function of parameters in the form of a pipeline on one device, so that one copy of them serves both.
    """

    def loss(params, mb):
        x = model.embed.apply(params["embed"], mb, None)
        for stage in params["blocks"]:

            def blocks(x, stage):
                for own in stage:
                    x = model.blocks[0].apply(jax.tree.map(lambda leaf: leaf[0], own), x, mb, None)
                return x

            x = jax.checkpoint(blocks)(x, stage) if remat == "full" else blocks(x, stage)
        loss, weight, *_ = model.head_loss.apply(params["head"], x, mb, None)
        return loss, weight

    def step(params, batch):
        groups = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch)

        def turn(sums, mb):
            (own, weight), grads = jax.value_and_grad(loss, has_aux=True)(params, mb)
            return jax.tree.map(lambda total, x: total + x.astype(total.dtype), sums, (own, weight, grads)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
        (total, weight, grads), _ = jax.lax.scan(turn, (jnp.float32(0), jnp.float32(0), zeros), groups)
        return total / weight, jax.tree.map(lambda x: x / weight, grads)

    return step


def attend(q_BTHd, k_BTHd, v_BTHd, fused: bool):
    """Causal attention."""
    implementation = "cudnn" if fused else "xla"
    return jax.nn.dot_product_attention(q_BTHd, k_BTHd, v_BTHd, is_causal=True, implementation=implementation)


def rms_norm(x_BTD, scale_D):
    """A norm that computes in float32 or wider, and answers in the dtype that it was given."""
    wide = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
    wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-5)
    return (wide * scale_D[None, None]).astype(x_BTD.dtype)


def _normal(key, size: Size, *shape: int):
    return (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(size.dtype)


def _init_block(size: Size, key, carry) -> dict:
    D, F = size.width, size.hidden
    shapes = {"qkv": (D, 3 * D), "proj": (D, D), "gate": (D, F), "up": (D, F), "down": (F, D)}
    keys = jax.random.split(key, len(shapes))
    norms = {name: jnp.ones(D, size.dtype) for name in ("norm1", "norm2")}
    return norms | {name: _normal(k, size, *shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


def _block(size: Size, p: dict, x_BTD, mb, key):
    B, T, D = x_BTD.shape
    q_BTHd, k_BTHd, v_BTHd = jnp.moveaxis(
        (rms_norm(x_BTD, p["norm1"]) @ p["qkv"]).reshape(B, T, 3, size.heads, -1), 2, 0
    )
    y_BTHd = attend(_turned(q_BTHd), _turned(k_BTHd), v_BTHd, size.fused)
    x_BTD += y_BTHd.reshape(B, T, D) @ p["proj"]
    h_BTD = rms_norm(x_BTD, p["norm2"])
    return x_BTD + (jax.nn.silu(h_BTD @ p["gate"]) * (h_BTD @ p["up"])) @ p["down"]


def _turned(x_BTHd):
    """Rotary positions, halves as pairs."""
    T, half = x_BTHd.shape[1], x_BTHd.shape[-1] // 2
    angle_Td = jnp.arange(T, dtype=jnp.float32)[:, None] * 10000.0 ** (-jnp.arange(half) / half)[None]
    cos, sin = jnp.cos(angle_Td)[None, :, None], jnp.sin(angle_Td)[None, :, None]
    a, b = x_BTHd[..., :half].astype(jnp.float32), x_BTHd[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHd.dtype)
