"""The mesh axis that products of a block are cut over, as a block sees it."""

import jax

TENSOR = "tensor"
"""The mesh axis in annotations."""


def tensor_devices() -> int:
    """How many devices of `TENSOR` the compiler spreads a pipeline's blocks over; 1 outside of a pipeline."""
    mesh = jax.sharding.get_abstract_mesh()
    is_left = bool(mesh.manual_axes) and TENSOR not in mesh.manual_axes
    return mesh.shape.get(TENSOR, 1) if is_left else 1
