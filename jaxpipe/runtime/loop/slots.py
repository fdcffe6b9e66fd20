"""Numbered buffers of the compiled loop.

Each kind of value rests in arrays ``[slots, ...]``, made by `jaxpipe.runtime.loop.device.Device.slots`; where idle
lanes write too, one more slot at the end is scratch for them.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.runtime.model import Tree


def put(slots: Tree, at, values: Tree, on_host: bool = False) -> Tree:
    """Writes a slot; slot -1 is the last one, the scratch slot."""

    def write(buffer, value):
        value = jax.device_put(value, jax.memory.Space.Host) if on_host else value
        return lax.dynamic_update_index_in_dim(buffer, value, jnp.where(at < 0, buffer.shape[0] - 1, at), 0)

    return jax.tree.map(write, slots, values)


def get(slots: Tree, at, on_host: bool = False) -> Tree:
    """Reads a slot; anything valid for slot -1."""
    values = jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, jnp.maximum(at, 0), keepdims=False), slots)
    return jax.device_put(values, jax.memory.Space.Device) if on_host else values


def add(accumulators: Tree, at, gradients: Tree) -> Tree:
    """``accumulators[at] += gradients``, in place, in the accumulators' dtypes."""

    def add_row(accumulator, gradient):
        row = lax.dynamic_index_in_dim(accumulator, at, keepdims=False) + gradient.astype(accumulator.dtype)
        return lax.dynamic_update_index_in_dim(accumulator, row, at, 0)

    return jax.tree.map(add_row, accumulators, gradients)
