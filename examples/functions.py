"""A transformer of plain functions on dicts of arrays, without Flax, that learns to sort."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpipe as jp

VOCAB, LENGTH = 10, 8


def normal(key, *shape):
    return jax.random.normal(key, shape) / shape[0] ** 0.5


def rms_norm(x):
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def make_embed(width):
    def init(key, mb):
        return {"table": normal(key, VOCAB, width), "positions": normal(jax.random.fold_in(key, 1), LENGTH, width)}

    return jp.Embed(init, lambda p, mb, key: p["table"][mb["tokens"]] + p["positions"][None])


def make_block(width):
    def init(key, x):
        keys, wide = jax.random.split(key, 4), 4 * width
        attention = {"qkv": normal(keys[0], width, 3 * width), "out": normal(keys[1], width, width)}
        return attention | {"up": normal(keys[2], width, wide), "down": normal(keys[3], wide, width)}

    def apply(p, x, mb, key):  # [B, T, width]
        q, k, v = jnp.split((rms_norm(x) @ p["qkv"])[:, :, None], 3, axis=-1)  # [B, T, one head, width]
        x = x + jax.nn.dot_product_attention(q, k, v)[:, :, 0] @ p["out"]
        return x + jax.nn.gelu(rms_norm(x) @ p["up"]) @ p["down"]

    return jp.Block(init, apply)


def make_head(width):
    def apply(p, x, mb, key):  # -> a sum and its count, for the pipeline divides once, after the last microbatch
        losses = optax.softmax_cross_entropy_with_integer_labels(rms_norm(x) @ p["kernel"], mb["sorted"])
        return losses.sum(), jnp.float32(losses.size)

    return jp.HeadLoss(lambda key, x, mb: {"kernel": normal(key, width, VOCAB)}, apply)


def make_model(layers=4, width=32):
    return jp.Model(make_embed(width), [make_block(width)] * layers, make_head(width))


def make_batch(seed=0, rows=64):
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (rows, LENGTH), dtype=np.int32)
    return {"tokens": tokens, "sorted": np.sort(tokens)}


def main(steps=30, pipe=4, repeats=1, schedule="zb_h1", **sizes):
    plan = jp.schedule.build(schedule, devices=pipe, microbatches=4, repeats=repeats)
    pipeline = jp.Pipeline(make_model(**sizes), schedule=plan, mesh=jp.make_mesh(pipe), remat="none")
    optimizer = pipeline.optimizer(optax.adam(3e-3))

    @jax.jit
    def train_step(params, state, batch):
        loss, grads = pipeline.value_and_grad(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, losses = pipeline.init(jax.random.key(0), make_batch()), []
    state = jax.jit(optimizer.init)(params)
    for step in range(steps):
        params, state, loss = train_step(params, state, make_batch(step))
        losses.append(float(loss))
    return losses


if __name__ == "__main__":
    jp.simulate_devices(4)
    print("losses:", *(f"{loss:.3f}" for loss in main()))
