"""Bytes of temporaries per device as the microbatches grow: the drop-in layer beside `Pipeline` with 1F1B.

The same blocks (LayerNorm, two products, residual; width 256) on 2 simulated devices, 64 rows per microbatch, full
remat. Run as ``python scripts/bench_memory.py [--microbatches 4 8 16 32]``; prints a table.
"""

import argparse

import jax
import jax.numpy as jnp
from flax import nnx

import jaxpipe as jp
from jaxpipe.nn import Pipelined, nnx_model
from jaxpipe.runtime.measure.sizes import memory_of
from jaxpipe.schedule import build

WIDTH, ROWS, LAYERS = 256, 64, 8


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


def layer_bytes(microbatches: int) -> int:
    """Of a gradient step of a model with the layer in it."""
    layer = Pipelined(Block, num_layers=LAYERS, mesh=jp.make_mesh(pipe=2), microbatches=microbatches, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    x = jax.ShapeDtypeStruct((microbatches * ROWS, WIDTH), jnp.float32)
    step = jax.jit(jax.value_and_grad(lambda state, x: (nnx.merge(graphdef, state)(x) ** 2).mean()))
    return memory_of(step.lower(state, x).compile()).temp_size_in_bytes


def pipeline_bytes(microbatches: int) -> int:
    """Of `Pipeline.value_and_grad` with the loss inside."""
    model = nnx_model(
        embed=lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs),
        block=Block,
        num_layers=LAYERS,
        head=lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs),
        loss=lambda y, mb: ((y**2).sum(), 1.0 * y.size),
        embed_call=lambda module, mb: module(mb["x"]),
    )
    pipe = jp.Pipeline(model, schedule=build("1f1b", devices=2, microbatches=microbatches), mesh=jp.make_mesh(pipe=2))
    batch = {"x": jax.ShapeDtypeStruct((microbatches * ROWS, WIDTH), jnp.float32)}
    params = jax.eval_shape(pipe.init, jax.eval_shape(lambda: jax.random.key(0)), batch)
    return memory_of(jax.jit(pipe.value_and_grad).lower(params, batch).compile()).temp_size_in_bytes


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[4, 8, 16, 32], metavar="M")
    counts = parser.parse_args().microbatches
    jp.simulate_devices(2)
    print(f"temporaries per device, MB; one microbatch of a block's input is {ROWS * WIDTH * 4 / 1e6:.3f} MB")
    print(f"{'M':>4} {'nn.Pipelined':>14} {'Pipeline, 1f1b':>16}")
    for count in counts:
        print(f"{count:4} {layer_bytes(count) / 1e6:14.2f} {pipeline_bytes(count) / 1e6:16.2f}")


if __name__ == "__main__":
    main()
