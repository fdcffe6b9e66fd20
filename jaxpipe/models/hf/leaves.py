"""Which tensors make a leaf, and how their numbers lie in it: one small value per way, each good in both directions.

Theirs are linear maps [out, in] with queries, keys and values apart; ours are [in, out] with the three in one kernel,
ordered by head (see `jaxpipe.models.gpt.Attention`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Shape = tuple[int, ...]
Index = tuple[slice, ...]


class Move(Protocol):
    """A way between tensors of theirs and one leaf (of one layer) of ours."""

    def shapes(self, ours: Shape) -> list[Shape]:
        """The shapes of theirs for a leaf of ours."""
        ...

    def take(self, tensors: Sequence[Any], index: Index) -> np.ndarray:
        """A part of ours, from tensors that are read where they are indexed."""
        ...

    def give(self, ours: np.ndarray) -> list[np.ndarray]:
        """Theirs, from the whole of ours."""
        ...


@dataclass(frozen=True)
class Same:
    """As it is."""

    def shapes(self, ours: Shape) -> list[Shape]:
        return [ours]

    def take(self, tensors: Sequence[Any], index: Index) -> np.ndarray:
        return tensors[0][index]

    def give(self, ours: np.ndarray) -> list[np.ndarray]:
        return [ours]


@dataclass(frozen=True)
class Turned:
    """[out, in] and [in, out]."""

    def shapes(self, ours: Shape) -> list[Shape]:
        return [ours[::-1]]

    def take(self, tensors: Sequence[Any], index: Index) -> np.ndarray:
        return tensors[0][index[::-1]].T

    def give(self, ours: np.ndarray) -> list[np.ndarray]:
        return [ours.T]


@dataclass(frozen=True)
class Heads:
    """Several maps to heads, [count * d, in] each (or their biases), and one kernel [in, …] ordered by group.

    Attributes:
        groups: K, groups that the heads come in.
        counts: Heads of each of their tensors in one group, such as (H/K, 1, 1) for queries, keys and values.
        dim: d.
    """

    groups: int
    counts: tuple[int, ...]
    dim: int

    def shapes(self, ours: Shape) -> list[Shape]:
        return [(self.groups * count * self.dim, *ours[:-1]) for count in self.counts]

    def take(self, tensors: Sequence[Any], index: Index) -> np.ndarray:
        parts = [tensor[:] for tensor in tensors]
        parts = [part.reshape(self.groups, -1, self.dim, *part.shape[1:]) for part in parts]
        joined = np.concatenate(parts, axis=1)
        return joined.reshape(-1, *joined.shape[3:]).T[index]

    def give(self, ours: np.ndarray) -> list[np.ndarray]:
        joined = ours.T.reshape(self.groups, sum(self.counts), self.dim, *ours.shape[:-1])
        cuts = np.split(joined, np.cumsum(self.counts)[:-1], axis=1)
        return [part.reshape(-1, *ours.shape[:-1]) for part in cuts]


@dataclass(frozen=True)
class Interleaved:
    """GPT-2's columns (q|k|v, head, dim) and ours (head, q|k|v, dim); both are [in, out].

    Attributes:
        heads: H.
    """

    heads: int

    def shapes(self, ours: Shape) -> list[Shape]:
        return [ours]

    def take(self, tensors: Sequence[Any], index: Index) -> np.ndarray:
        return self._swap(tensors[0][:], 3, self.heads)[index]

    def give(self, ours: np.ndarray) -> list[np.ndarray]:
        return [self._swap(ours, self.heads, 3)]

    def _swap(self, x: np.ndarray, first: int, second: int) -> np.ndarray:
        return x.reshape(*x.shape[:-1], first, second, -1).swapaxes(-3, -2).reshape(x.shape)


@dataclass(frozen=True)
class Leaf:
    """One row of a family's table.

    Attributes:
        path: Of ours in the canonical tree. Below ``blocks`` every layer is a row of it.
        keys: Of theirs; ``{i}`` is the number of the layer.
        move: How numbers lie.
    """

    path: str
    keys: tuple[str, ...]
    move: Move

    @property
    def stacked(self) -> bool:
        """Whether the leaf has a row per layer."""
        return self.path.startswith("blocks/")

    def tensors(self, shape: Shape) -> list[tuple[str, Shape]]:
        """Names and shapes of all their tensors in a leaf of this shape, in the order of `give`."""
        own = self.move.shapes(shape[1:] if self.stacked else shape)
        rows = range(shape[0]) if self.stacked else (0,)
        return [(key.format(i=row), each) for row in rows for key, each in zip(self.keys, own, strict=True)]

    def give(self, ours: np.ndarray) -> list[np.ndarray]:
        """All their tensors, in the order of `tensors`."""
        return [part for row in (ours if self.stacked else (ours,)) for part in self.move.give(row)]


def leaf(path: str, *keys: str, move: Move | None = None) -> Leaf:
    """A row of a table; with no move the numbers lie the same way."""
    return Leaf(path, keys, move or Same())


def read_part(own: Leaf, shape: Shape, index: Index, dtype: Any, tensor: Callable[[str], Any]) -> np.ndarray:
    """A part of a leaf, holding no more than that part and one layer's tensors at a time.

    Args:
        own: The leaf.
        shape: Of the whole leaf.
        index: A slice per dim.
        dtype: Of the result.
        tensor: ``key -> a tensor that is read where it is indexed``.
    """
    index = tuple(slice(*each.indices(size)) for each, size in zip(index, shape, strict=True))
    out = np.empty([len(range(each.start, each.stop)) for each in index], dtype)
    if not own.stacked:
        out[...] = own.move.take([tensor(key) for key in own.keys], index)
        return out
    for place, row in enumerate(range(index[0].start, index[0].stop)):
        out[place] = own.move.take([tensor(key.format(i=row)) for key in own.keys], index[1:])
    return out
