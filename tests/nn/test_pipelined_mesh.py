"""The drop-in layer on a mesh with every axis: rows split over data and fsdp, blocks annotated for tensor."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers import tree_allclose

import jaxpipe as jp
from jaxpipe.nn import Pipelined

WIDTH = 8


class Block(nnx.Module):
    def __init__(self, rngs):
        columns, rows = ((None, "tensor"), ("tensor", None))
        self.up, self.down = (
            nnx.Linear(
                *sizes,
                kernel_init=nnx.with_partitioning(nnx.initializers.lecun_normal(), cut),
                use_bias=False,
                rngs=rngs,
            )
            for sizes, cut in (((WIDTH, 2 * WIDTH), columns), ((2 * WIDTH, WIDTH), rows))
        )
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(self.down(jnp.tanh(self.up(x))))


def value_and_grad(mesh, microbatches: int):
    """A loss and its gradients, of weights and input."""
    with nnx.use_eager_sharding(False):
        layer = Pipelined(Block, num_layers=2, mesh=mesh, microbatches=microbatches, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3, WIDTH)), jnp.float32)
    step = nnx.jit(nnx.value_and_grad(lambda layer, x: (layer(x) ** 2).mean(), argnums=(0, 1)))
    value, (weights, dx) = step(layer, x)
    return value, nnx.to_pure_dict(weights), dx


def test_the_layer_gives_the_same_on_a_mesh_of_all_axes():
    value, weights, dx = value_and_grad(jp.make_mesh(pipe=2, fsdp=2, tensor=2), microbatches=2)
    expected, expected_weights, expected_dx = value_and_grad(jp.make_mesh(pipe=1), microbatches=4)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    tree_allclose(jax.device_get((weights, dx)), jax.device_get((expected_weights, expected_dx)))
