"""How leaves come together for a step and gradients go apart after it: the collectives outside the loop.

Inside the loop's `shard_map` the axis `tensor` is left to the compiler, and XLA makes whatever an explicit gather or
reduce-scatter is given whole over such an axis first. So these run in a `shard_map` of their own over `tensor`, where a
leaf is cut over it: every device moves its own part only.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxpipe.runtime.layout.mesh import DATA, FSDP, PIPE, TENSOR, on_cpu
from jaxpipe.runtime.layout.rest import Rest


def add_up(x, axes: str | Sequence[str], mesh_is_cpu: bool):
    """The sum over manual axes, in the dtype of x: the one way to add up what may be of any dtype.

    Truth values are counted, and true where any is. On CPUs 16-bit numbers are added up as float32: where some axis is
    left to the compiler, XLA's CPU backend aborts on a sum of their own.

    Args:
        x: This device's summand.
        axes: The axes.
        mesh_is_cpu: Whether the devices are CPU devices.
    """
    return lax.psum(_widened(x, mesh_is_cpu), axes).astype(x.dtype)


def _widened(x, mesh_is_cpu: bool):
    """What is added up in place of x."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.int32)
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return x.astype(jnp.float32) if narrow and mesh_is_cpu else x


def within_tensor(function: Callable, rest: Rest, leaf):
    """Runs a function of a leaf that is cut over `tensor`, and stays so, on each part."""
    if rest.tensor is None:
        return function(leaf)
    spec = PartitionSpec(*[None] * rest.tensor, TENSOR)
    mapped = jax.shard_map(function, in_specs=spec, out_specs=spec, axis_names={TENSOR}, check_vma=False)
    return mapped(leaf)


def gather(leaf, rest: Rest, axes: Sequence[str]):
    """A leaf whole over some axes.

    Args:
        leaf: This device's part.
        rest: Of the leaf.
        axes: Of `fsdp` and `pipe`.
    """

    def run(leaf):
        for axis, dim in ((FSDP, rest.fsdp), (PIPE, rest.pipe)):  # [1]
            if axis in axes and dim is not None:
                leaf = lax.all_gather(leaf, axis, axis=dim, tiled=True)
        return leaf

    return within_tensor(run, rest, leaf)


# [1] Where both cut one dim, `fsdp` lies within `pipe`.


def reduce(leaf, rest: Rest, mesh: Mesh, axes: Sequence[str]):
    """Sums over some axes, and what is left of it for this device: its part over those that cut the leaf.

    Args:
        leaf: This device's summand.
        rest: Of the sum.
        mesh: The mesh; axes of size 1 need no sum.
        axes: Of `pipe`, `fsdp` and `data`.
    """
    used = [axis for axis in (PIPE, FSDP, DATA) if axis in axes and mesh.shape[axis] > 1]

    def run(leaf):
        dtype, leaf = leaf.dtype, _widened(leaf, on_cpu(mesh))
        for axis in used:
            dim = {PIPE: rest.pipe, FSDP: rest.fsdp}.get(axis)
            if dim is not None:
                leaf = lax.psum_scatter(leaf, axis, scatter_dimension=dim, tiled=True)
        # What is scattered already costs less to sum.
        whole = tuple(axis for axis in used if {PIPE: rest.pipe, FSDP: rest.fsdp}.get(axis) is None)
        return (lax.psum(leaf, whole) if whole else leaf).astype(dtype)

    return within_tensor(run, rest, leaf)
