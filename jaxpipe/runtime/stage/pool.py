"""Buffers shared by stages that are not alike: one list of shapes in which every stage finds places for its own.

Stages may hold different numbers and kinds of blocks, and so keep different residuals. A slot has one form for all of
them: for every shape and dtype as many places as the stage that needs most. A stage fills its places and leaves zeros
in the others.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp


def key_of(shape) -> tuple:
    """What makes two places interchangeable."""
    return tuple(shape.shape), jnp.dtype(shape.dtype)


@dataclass(frozen=True)
class Pool:
    """The places of a slot.

    Attributes:
        shapes: One per place.
    """

    shapes: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def union(cls, lists: Sequence[Sequence[jax.ShapeDtypeStruct]]) -> "Pool":
        """The smallest pool in which each of several lists finds its places.

        Example:
            >>> a, b = jax.ShapeDtypeStruct((2,), "float32"), jax.ShapeDtypeStruct((3,), "float32")
            >>> [place.shape for place in Pool.union([[a, a], [b, a]]).shapes]
            [(2,), (2,), (3,)]
        """
        shapes: list[jax.ShapeDtypeStruct] = []
        for own in lists:
            have = Counter(map(key_of, shapes))
            for shape in own:
                have[key_of(shape)] -= 1
                if have[key_of(shape)] < 0:
                    shapes.append(shape)
        return cls(tuple(shapes))

    def places(self, own: Sequence) -> list[int]:
        """Which places the values of a list take: for each of them the first free one of its shape."""
        free: dict[tuple, list[int]] = {}
        for place, shape in enumerate(self.shapes):
            free.setdefault(key_of(shape), []).append(place)
        return [free[key_of(shape)].pop(0) for shape in own]

    def fill(self, values: Sequence, zeros) -> list:
        """Values in their places, zeros elsewhere.

        Args:
            values: Arrays.
            zeros: ``shapes -> arrays``.
        """
        taken = dict(zip(self.places(values), values, strict=True))
        rest = [place for place in range(len(self.shapes)) if place not in taken]
        taken |= zip(rest, zeros([self.shapes[place] for place in rest]), strict=True)
        return [taken[place] for place in range(len(self.shapes))]

    def take(self, own: Sequence, pooled: Sequence) -> list:
        """The values of a list with these shapes from their places."""
        return [pooled[place] for place in self.places(own)]
