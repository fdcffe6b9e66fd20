"""Weights with no training around them: the canonical tree of a checkpoint or of a Hugging Face folder, on a mesh.

Leaves are read one after the other, each device its own part, and nothing is compiled.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, Sharding

from jaxpipe.checkpoint.meta import Meta, ModelConfig
from jaxpipe.checkpoint.store import check_fits, check_sums, read_leaves
from jaxpipe.errors import ConfigError
from jaxpipe.models.hf import HFFolder, Leaf, family_of, leaf_shapes, read_config, read_part
from jaxpipe.runtime.layout.checksum import checksum
from jaxpipe.runtime.layout.mesh import FSDP, PIPE, TENSOR
from jaxpipe.runtime.layout.rest import Sizes, end_rest
from jaxpipe.runtime.layout.state import CanonicalLeaf
from jaxpipe.runtime.layout.tree import Tree, set_path

Place = Callable[[Sequence[int]], Sharding]
"""Shape of a leaf -> how it rests."""
DTYPES = ("float32", "bfloat16", "float64")


def over(mesh: Mesh) -> Place:
    """Canonical leaves over the axes of a mesh: each on the first dim that the size of the axis divides."""
    sizes = Sizes(mesh.shape[PIPE], mesh.shape.get(FSDP, 1), mesh.shape.get(TENSOR, 1))
    return lambda shape: NamedSharding(mesh, end_rest(shape, sizes).spec())


def open_hf(
    path: str | Path, dtype: str | None = None, *, otherwise: str | None = None
) -> tuple[ModelConfig, "HFWeights"]:
    """A Hugging Face folder, checked: its config as ours, and its weights.

    Args:
        path: The folder.
        dtype: That weights are cast to, and computed in; by default the folder's own.
        otherwise: What to cast to where weights cannot rest in the folder's own dtype.

    Raises:
        ConfigError: An architecture, an option or a dtype that we do not have.
        DataError: A tensor is missing, unknown or of another shape.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} must be one of {', '.join(DTYPES)}; try 'float32'")
    folder = HFFolder(path)
    family = family_of(folder.config, folder.where)
    cfg = read_config(folder.config, folder.where, "float32")
    shapes = leaf_shapes(cfg)
    table = folder.check(family, cfg, shapes)
    if dtype is None:
        found = {name for leaf in table for name in folder.dtypes_of(leaf, shapes[leaf.path])}
        dtype = found.pop() if len(found) == 1 else "float32"
        dtype = dtype if dtype in DTYPES else otherwise
        if dtype is None:
            raise ConfigError(
                f"{path} holds float16, which weights cannot rest in here; try --dtype float32 or bfloat16"
            )
    return replace(cfg, dtype=dtype, param_dtype=dtype), HFWeights(folder, table, shapes, np.dtype(dtype))


class HFWeights:
    """The leaves of a folder of Hugging Face.

    Attributes:
        table: Its leaves.
        shapes: Of the leaves, by path.
        dtype: Of the leaves.
    """

    def __init__(self, folder: HFFolder, table: tuple[Leaf, ...], shapes: dict[str, tuple[int, ...]], dtype: np.dtype):
        self._folder, self.table, self.shapes, self.dtype = folder, table, shapes, dtype

    def part(self, leaf: Leaf, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """A part of a leaf; by default all of it."""
        shape = self.shapes[leaf.path]
        index = (slice(None),) * len(shape) if index is None else index
        return read_part(leaf, shape, index, self.dtype, self._folder.tensor)

    def tree(self, place: Place) -> Tree:
        """The canonical tree, each device reading its own parts."""
        tree: Tree = {}
        for leaf in self.table:
            shape = self.shapes[leaf.path]
            array = jax.make_array_from_callback(shape, place(shape), lambda index, own=leaf: self.part(own, index))
            tree = set_path(tree, leaf.path, array)
        return tree


def checkpoint_leaves(meta: Meta, place: Place) -> list[CanonicalLeaf]:
    """The leaves of the parameters in a checkpoint."""
    return [
        CanonicalLeaf(tuple(name.split("/")), (), (), shape, jnp.dtype(leaf["dtype"]), place(shape))
        for name, leaf in meta.leaves.items()
        if name.startswith("params/")
        for shape in [tuple(leaf["shape"])]
    ]


def read_checked(path: epath.Path, meta: Meta, leaves: Sequence[CanonicalLeaf]) -> Iterable[tuple[str, jax.Array]]:
    """Leaves of a checkpoint by path below the parameters, one after the other, each held to its checksum.

    Raises:
        CheckpointError: One cannot be read or is damaged.
    """
    check = jax.jit(checksum)
    for leaf in leaves:
        (array,) = read_leaves(path, [leaf])
        check_sums(path, meta, [leaf], check(array)[None])
        yield "/".join(leaf.path[1:]), array


def read_weights(path: epath.Path, meta: Meta, place: Place) -> Tree:
    """The canonical tree of a checkpoint's parameters.

    Raises:
        CheckpointError: A leaf cannot be read or is damaged.
    """
    tree: Tree = {}
    leaves = checkpoint_leaves(meta, place)
    check_fits(path, [leaf.abstract for leaf in leaves])
    for name, array in read_checked(path, meta, leaves):
        tree = set_path(tree, name, array)
    return tree
