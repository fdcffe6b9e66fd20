"""The model contract: what a pipeline needs to know about a model, as plain functions.

A model is an embedding, a list of blocks and a head with a loss. Nothing here knows of stages, devices or
schedules, and nothing in a model does either: the same value is run by `Pipeline` and by `sequential`.

Words: `mb` is the batch cut to one row group (every leaf ``[rows, ...]``); `carry` is what blocks change, any
pytree of arrays; `key` is a `jax.random` key, or None for deterministic evaluation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxpipe.errors import PartitionError

Tree = Any
"""A pytree of arrays."""


@dataclass(frozen=True)
class Embed:
    """The way in.

    Attributes:
        init: ``(key, mb) -> params``.
        apply: ``(params, mb, key) -> carry``.
    """

    init: Callable[[Any, Tree], Tree]
    apply: Callable[[Tree, Tree, Any], Tree]


@dataclass(frozen=True)
class Block:
    """One transformer layer: any map whose output has the structure, shapes and dtypes of its input.

    Attributes:
        init: ``(key, carry) -> params``.
        apply: ``(params, carry, mb, key) -> carry``.
        kind: Blocks of equal kind have parameters of equal structure.
    """

    init: Callable[[Any, Tree], Tree]
    apply: Callable[[Tree, Tree, Tree, Any], Tree]
    kind: str = "block"


@dataclass(frozen=True)
class HeadLoss:
    """The way out.

    Attributes:
        init: ``(key, carry, mb) -> params``.
        apply: ``(params, carry, mb, key) -> (loss_sum, weight)``, two scalars. The loss of a batch is the sum of
            `loss_sum` over all row groups divided once by the sum of `weight`, so that any mask gives the
            unpipelined mean. `weight` is a constant for differentiation.
    """

    init: Callable[[Any, Tree, Tree], Tree]
    apply: Callable[[Tree, Tree, Tree, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Model:
    """An embedding, blocks and a head.

    Args:
        embed: Anything with `Embed`'s two functions.
        blocks: One `Block` per layer, in order.
        head_loss: Anything with `HeadLoss`'s two functions.
        tie: Leaves of the head that live in the embedding, once: ``{"head/kernel": "embed/table"}``. Paths are
            slash-separated keys below `head` and `embed`. The head's `apply` sees the embedding's leaf in that place.

    Raises:
        PartitionError: No blocks, or a tie whose paths do not start with ``head/`` and ``embed/``.
    """

    embed: Any
    blocks: Sequence[Any]
    head_loss: Any
    tie: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if not self.blocks:
            raise PartitionError("blocks=[] must hold at least one block; try one per transformer layer")
        for head, embed in self.tie.items():
            if not head.startswith("head/") or not embed.startswith("embed/"):
                raise PartitionError(
                    f"tie={{{head!r}: {embed!r}}} must map a path 'head/…' to a path 'embed/…'; "
                    "try {'head/kernel': 'embed/table'}"
                )
