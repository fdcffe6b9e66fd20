"""A Flax NNX encoder of padded sequences whose blocks are one layer, `Pipelined`; all else is as in any NNX program."""

from functools import partial

import numpy as np
import optax
from flax import nnx

import jaxpipe as jp
from jaxpipe.nn import Pipelined


class Block(nnx.Module):
    def __init__(self, width, dropout, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, width, use_bias=False, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)
        self.drop = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x, mask):  # [B, T, width], [B, 1, 1, T]
        x = x + self.drop(self.attn(self.norm1(x), mask=mask))
        return x + self.drop(self.down(nnx.gelu(self.up(self.norm2(x)))))


class Encoder(nnx.Module):
    """Says which of 4 letters a padded text has most of."""

    def __init__(self, layers=4, width=32, dropout=0.1, *, pipe=4, microbatches=4, repeats=1, rngs):
        self.table = nnx.Embed(5, width, rngs=rngs)  # 4 is the padding
        self.blocks = Pipelined(
            partial(Block, width, dropout),
            num_layers=layers,
            mesh=jp.make_mesh(pipe),
            microbatches=microbatches,
            repeats=repeats,
            inputs=("constant",),  # the mask: cut into microbatches as x is, without a gradient
            rngs=rngs,
        )
        self.norm, self.out = nnx.LayerNorm(width, rngs=rngs), nnx.Linear(width, 4, rngs=rngs)

    def __call__(self, tokens):  # [B, T] -> [B, 4]
        mask = tokens < 4
        x = self.norm(self.blocks(self.table(tokens), mask[:, None, None]))
        return self.out(x.mean(axis=1, where=mask[:, :, None]))


def make_batch(seed=0, rows=64, length=12):
    rng = np.random.default_rng(seed)
    letters, ends = rng.integers(0, 4, (rows, length), dtype=np.int32), rng.integers(4, length + 1, (rows, 1))
    tokens = np.where(np.arange(length)[None] < ends, letters, 4)
    return {"tokens": tokens, "labels": (tokens[:, :, None] == np.arange(4)[None, None]).sum(1).argmax(-1)}


def mean_loss(encoder, batch):
    return optax.softmax_cross_entropy_with_integer_labels(encoder(batch["tokens"]), batch["labels"]).mean()


@nnx.jit
def train_step(encoder, optimizer, batch):
    loss, grads = nnx.value_and_grad(mean_loss)(encoder, batch)
    optimizer.update(encoder, grads)
    return loss


def main(steps=30, **options):
    encoder = Encoder(**options, rngs=nnx.Rngs(0, dropout=1))
    optimizer = nnx.Optimizer(encoder, optax.adam(3e-3), wrt=nnx.Param)
    losses = [float(train_step(encoder, optimizer, make_batch(step))) for step in range(steps)]
    encoder.eval()  # no dropout from here
    print(f"loss of new texts: {mean_loss(encoder, make_batch(steps)):.3f}")
    return losses


if __name__ == "__main__":
    jp.simulate_devices(4)
    print("losses:", *(f"{loss:.3f}" for loss in main()))
