"""Saving arrays that do not exist yet: each is made when its turn comes, written, and let go before the next."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import future, type_handlers

from jaxpipe.checkpoint.meta import Meta
from jaxpipe.checkpoint.owned import META, STATE
from jaxpipe.checkpoint.quiet import hush


@dataclass(frozen=True)
class Later:
    """An array to be.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        make: Makes it.
    """

    shape: tuple[int, ...]
    dtype: Any
    make: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.size * np.dtype(self.dtype).itemsize


class LaterHandler(type_handlers.NumpyHandler):
    """Teaches Orbax to write `Later` one after the other, as what is read back like any array of JAX."""

    def typestr(self) -> str:
        return "jax.Array"

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> Sequence[future.Future]:
        args = args or [type_handlers.SaveArgs()] * len(values)
        for value, info, arg in zip(values, infos, args, strict=True):
            await self._background_serialize([await asyncio.to_thread(value.make)], [info], [arg])
        return []


def write_checkpoint(path: Path, tree: Any, meta: Callable[[], Meta]) -> None:
    """Writes a checkpoint whose arrays are made one at a time.

    Args:
        path: The folder that becomes the checkpoint.
        tree: Of `Later`.
        meta: Is asked for the description when all arrays are written.
    """
    hush()
    handlers = type_handlers.create_type_handler_registry((Later, LaterHandler()), (jax.Array, LaterHandler()))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=handlers)) as writer:
        writer.save(path / STATE, args=ocp.args.PyTreeSave(tree))
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        writer.save(path / META, args=ocp.args.JsonSave(meta().to_json()))
