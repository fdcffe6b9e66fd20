"""How a leaf rests on the mesh: which of its dims are cut over which axes, and which leaves a model wants cut over
`tensor`.

`tensor` comes from the model's own annotations, the rest follows from shapes. A dim that holds `tensor` takes no other
axis: what is gathered over one axis would come out interleaved over the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxpipe.errors import PartitionError
from jaxpipe.runtime.layout.mesh import FSDP, PIPE, TENSOR
from jaxpipe.runtime.layout.tree import Tree


@dataclass(frozen=True)
class Rest:
    """The dims of a leaf that are cut, by axis; None where it is whole.

    Attributes:
        pipe: Cut over `pipe`.
        fsdp: Cut over `fsdp`; the same dim as `pipe`'s where no other divides, within it then.
        tensor: Cut over `tensor`.
    """

    pipe: int | None = None
    fsdp: int | None = None
    tensor: int | None = None

    def spec(self, axes: Sequence[str] = (PIPE, FSDP, TENSOR)) -> PartitionSpec:
        """The partition spec, of some of the axes.

        Example:
            >>> Rest(pipe=0, fsdp=0, tensor=1).spec()
            P(('pipe', 'fsdp'), 'tensor')
        """
        names: dict[int, list[str]] = {}
        for axis in (PIPE, FSDP, TENSOR):
            dim = getattr(self, axis)
            if axis in axes and dim is not None:
                names.setdefault(dim, []).append(axis)
        dims = [names.get(dim, []) for dim in range(max(names, default=-1) + 1)]
        return PartitionSpec(*(tuple(each) if len(each) > 1 else each[0] if each else None for each in dims))


@dataclass(frozen=True)
class Sizes:
    """Sizes of the axes that leaves are cut over."""

    pipe: int
    fsdp: int = 1
    tensor: int = 1


def first_dim(shape: Sequence[int], devices: int, taken: Sequence[int | None] = ()) -> int | None:
    """The first dim that `devices` divides and that is not taken, or None."""
    if devices == 1:
        return None
    return next((dim for dim, size in enumerate(shape) if size and size % devices == 0 and dim not in taken), None)


def end_rest(shape: Sequence[int], sizes: Sizes, tensor: int | None = None) -> Rest:
    """How a leaf of embedding, head or a canonical tree rests: over `pipe` on its first dim that P divides.

    Args:
        shape: Of the whole leaf.
        sizes: Of the axes.
        tensor: The dim that the model wants cut over `tensor`; a leaf that it does not divide stays whole.
    """
    tensor = tensor if tensor is not None and sizes.tensor > 1 and shape[tensor] % sizes.tensor == 0 else None
    pipe = first_dim(shape, sizes.pipe, [tensor])
    fsdp = first_dim(shape, sizes.fsdp, [tensor, pipe])
    if fsdp is None and pipe is not None and sizes.fsdp > 1 and shape[pipe] % (sizes.pipe * sizes.fsdp) == 0:
        fsdp = pipe
    return Rest(pipe, fsdp, tensor)


def block_rest(shape: Sequence[int], lead: int, sizes: Sizes, tensor: int | None = None) -> Rest:
    """How a leaf of a block rests in the pipeline's layout: over `pipe` on its first dim.

    Args:
        shape: Of the whole leaf.
        lead: Dims before the block's own.
        sizes: Of the axes.
        tensor: The block's own dim that the model wants cut over `tensor`.
    """
    dim = None if tensor is None or sizes.tensor == 1 else lead + tensor
    return Rest(0, first_dim(shape, sizes.fsdp, [*range(lead), dim]), dim)


def tensor_dims(specs: Mapping[str, Any]) -> dict[str, int]:
    """From a model's annotations, the dim of each leaf that lies on `tensor`, by slash-separated path.

    Args:
        specs: Partition specs by path, or a tree of them like the parameters.

    Raises:
        PartitionError: A spec with another axis.

    Example:
        >>> tensor_dims({"up": PartitionSpec(None, "tensor"), "mlp": {"down": PartitionSpec("tensor")}})
        {'up': 1, 'mlp/down': 0}
    """
    found: dict[str, int] = {}
    for name, value in specs.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{path}": dim for path, dim in tensor_dims(value).items()}
            continue
        for dim, axis in enumerate(value or ()):
            if axis in (TENSOR, (TENSOR,)):
                found[name] = dim
            elif axis is not None and axis != ():
                raise PartitionError(
                    f"specs={{{name!r}: {value}}} may name only the axis {TENSOR!r}, the others are the pipeline's; "
                    f"try {PartitionSpec(*(TENSOR if a in (TENSOR, (TENSOR,)) else None for a in value))}"
                )
    return found


def check_specs(name: str, dims: Mapping[str, int], params: Tree, tied: Sequence[str], tensor: int) -> None:
    """Checks annotations against the parameters of one block, or of embedding or head.

    Args:
        name: Whose.
        dims: From `tensor_dims`.
        params: Shapes.
        tied: Paths of leaves that live in the embedding instead.
        tensor: Size of the axis that must divide; 1 where leaves may stay whole.

    Raises:
        PartitionError: A path that is not there, or a dim that is not or that `tensor` does not divide.
    """
    shapes = {slashed(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}
    for path, dim in dims.items():
        if path in tied:
            continue
        if path not in shapes:
            raise PartitionError(
                f"specs of {name} name {path!r}, which is no parameter; try one of {', '.join(map(repr, shapes))}"
            )
        if dim >= len(shapes[path]):
            raise PartitionError(
                f"specs of {name} cut dim {dim} of {path!r}, which has shape {list(shapes[path])}; "
                f"try dim {max(0, len(shapes[path]) - 1)}"
            )
        if shapes[path][dim] % tensor:
            size = shapes[path][dim]
            near = max(n for n in range(1, tensor + 1) if size % n == 0)
            raise PartitionError(
                f"{name}/{path} has size {size} in dim {dim}, which must be divisible by mesh.tensor={tensor}; "
                f"try mesh.tensor={near}"
            )


def slashed(path: Sequence[Any]) -> str:
    """A path of JAX's keys as text: keys with slashes between."""
    return "/".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
