"""A vision transformer in Flax NNX, trained as a 1F1B pipeline by `from_nnx`, then handed back as what it was."""

import jax
import numpy as np
import optax
from flax import nnx

import jaxpipe as jp
from jaxpipe.nn import from_nnx


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, width, use_bias=False, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):  # [B, patches, width]
        x = x + self.attn(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class ViT(nnx.Module):
    def __init__(self, layers, width, rngs):
        self.patches = nnx.Conv(1, width, (2, 2), strides=2, padding="VALID", rngs=rngs)
        self.positions = nnx.Param(rngs.params.normal((16, width)))
        self.blocks = nnx.List([Block(width, rngs) for _ in range(layers)])
        self.norm, self.out = nnx.LayerNorm(width, rngs=rngs), nnx.Linear(width, 4, rngs=rngs)

    def embed(self, images):  # [B, 8, 8, 1] -> [B, 16, width]
        return self.patches(images).reshape(len(images), *self.positions.shape) + self.positions[None]

    def head(self, x):
        return self.out(self.norm(x).mean(axis=1))

    def __call__(self, images):
        return self.head(nnx.Sequential(*self.blocks)(self.embed(images)))


def make_batch(seed=0, rows=64):  # images with noise and a bright quadrant; which one is the label
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, rows, dtype=np.int32)
    bright = np.eye(4)[labels].reshape(rows, 2, 2, 1).repeat(4, axis=1).repeat(4, axis=2)
    return {"images": (bright + 0.3 * rng.normal(size=bright.shape)).astype(np.float32), "labels": labels}


def loss_sum(logits, mb):  # a sum and its count, for the pipeline divides once, after the last microbatch
    return optax.softmax_cross_entropy_with_integer_labels(logits, mb["labels"]).sum(), np.float32(len(logits))


def wrap(vit, batch):
    embed, head = lambda vit, mb: vit.embed(mb["images"]), lambda vit, x, mb: vit.head(x)
    return from_nnx(vit, blocks="blocks", embed=embed, head=head, loss=loss_sum, batch=batch)


def main(steps=30, pipe=4, repeats=1, schedule="1f1b", layers=4, width=32):
    wrapped = wrap(ViT(layers, width, nnx.Rngs(0)), make_batch())
    plan = jp.schedule.build(schedule, devices=pipe, microbatches=4, repeats=repeats)
    pipeline = jp.Pipeline(wrapped.model, schedule=plan, mesh=jp.make_mesh(pipe))
    optimizer = pipeline.optimizer(optax.adam(3e-3))

    @jax.jit
    def train_step(params, state, batch):
        loss, grads = pipeline.value_and_grad(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = pipeline.from_canonical(wrapped.canonical())
    state, losses = jax.jit(optimizer.init)(params), []
    for step in range(steps):
        params, state, loss = train_step(params, state, make_batch(step))
        losses.append(float(loss))
    vit, test = wrapped.write_back(pipeline.to_canonical(params)), make_batch(steps)
    print(f"the trained ViT tells {(vit(test['images']).argmax(-1) == test['labels']).mean():.0%} of new images right")
    return losses


if __name__ == "__main__":
    jp.simulate_devices(4)
    print("losses:", *(f"{loss:.3f}" for loss in main()))
