"""A GPT of Flax Linen modules, trained by `linen_model` on the bytes of a file of Python's standard library."""

import argparse
import inspect

import jax
import numpy as np
import optax
from flax import linen as nn

import jaxpipe as jp
from jaxpipe.nn import linen_model

normal = nn.initializers.normal(0.02)


class Embed(nn.Module):
    width: int

    @nn.compact
    def __call__(self, mb):  # tokens [B, T] -> [B, T, width]
        positions = self.param("positions", normal, (mb["tokens"].shape[1], self.width))
        return nn.Embed(256, self.width, embedding_init=normal, name="table")(mb["tokens"]) + positions[None]


class Block(nn.Module):
    dropout: float

    @nn.compact
    def __call__(self, x, deterministic):  # [B, T, width]
        h = nn.MultiHeadDotProductAttention(2, use_bias=False)(nn.LayerNorm()(x), mask=nn.make_causal_mask(x[..., 0]))
        x = x + nn.Dropout(self.dropout)(h, deterministic)
        h = nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x))))
        return x + nn.Dropout(self.dropout)(h, deterministic)


class Head(nn.Module):
    @nn.compact
    def __call__(self, x):  # [B, T, width] -> [B, T, 256]
        return nn.LayerNorm()(x) @ self.param("table", normal, (256, x.shape[-1])).T


def make_batch(seed=0, rows=16, length=32):
    text = np.frombuffer(inspect.getsource(argparse).encode(), np.uint8).astype(np.int32)
    starts = np.random.default_rng(seed).integers(0, len(text) - length, (rows, 1))
    windows = text[starts + np.arange(length + 1)[None]]
    return {"tokens": windows[:, :-1], "targets": windows[:, 1:]}


def loss_sum(logits, mb):  # a sum and its count, for the pipeline divides once, after the last microbatch
    return optax.softmax_cross_entropy_with_integer_labels(logits, mb["targets"]).sum(), np.float32(mb["targets"].size)


def make_model(layers=4, width=32, dropout=0.1):
    parts = {"embed": Embed(width), "block": Block(dropout), "head": Head()}
    return linen_model(**parts, num_layers=layers, loss=loss_sum, tie={"head/table": "embed/table/embedding"})


def main(steps=30, pipe=4, repeats=1, schedule="1f1b", **sizes):
    plan = jp.schedule.build(schedule, devices=pipe, microbatches=4, repeats=repeats)
    pipeline = jp.Pipeline(make_model(**sizes), schedule=plan, mesh=jp.make_mesh(pipe), remat="none")
    optimizer, key = pipeline.optimizer(optax.adamw(3e-3)), jax.random.key(0)

    @jax.jit
    def train_step(params, state, batch, key):
        loss, grads = pipeline.value_and_grad(params, batch, key)  # without a key there is no dropout
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, losses = pipeline.init(key, make_batch()), []
    state = jax.jit(optimizer.init)(params)
    for step in range(steps):
        params, state, loss = train_step(params, state, make_batch(step), jax.random.fold_in(key, step))
        losses.append(float(loss))
    return losses


if __name__ == "__main__":
    jp.simulate_devices(4)
    print("losses:", *(f"{loss:.3f}" for loss in main()))
