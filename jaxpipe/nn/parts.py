"""What the adapters share: a module as two functions, and such parts as the pieces of a model.

An adapter knows how its library makes and calls a module. How many blocks there are, of which kinds, and what the model
asks of an embedding, a block and a head is the same for all, and lives here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from jaxpipe.errors import ConfigError
from jaxpipe.runtime.layout.tree import Tree
from jaxpipe.runtime.model import Block, Embed, HeadLoss, Specs


class Part(Protocol):
    """One module as two functions, and how its parameters may be cut."""

    @property
    def specs(self) -> Specs:
        """Partition specs over the mesh axis `tensor`, see `jaxpipe.runtime.model.Model`."""
        ...

    def init(self, key: Any, *inputs: Tree) -> dict[str, Any]:
        """The parameters of a new module, as nested dicts with string keys."""
        ...

    def apply(self, params: Tree, key: Any, *inputs: Tree) -> Any:
        """Calls the module with these parameters; deterministic where `key` is None."""
        ...


def embed_of(part: Part) -> Embed:
    """The embedding: its inputs are ``(mb,)``."""
    return Embed(
        init=lambda key, mb: part.init(key, mb),
        apply=lambda params, mb, key: part.apply(params, key, mb),
        specs=part.specs,
    )


def head_of(part: Part, loss: Any) -> HeadLoss:
    """The head: its inputs are ``(carry, mb)``, and `loss` is called with what it returns and `mb`."""
    return HeadLoss(
        init=lambda key, carry, mb: part.init(key, carry, mb),
        apply=lambda params, carry, mb, key: loss(part.apply(params, key, carry, mb), mb),
        specs=part.specs,
    )


def blocks_of(
    block: Any,
    num_layers: int | None,
    layers: Sequence[str] | None,
    calls: Mapping[str, Any],
    make_part: Callable[..., Part],
    noun: str,
) -> list[Block]:
    """One `Block` per layer; those of a kind are the same object.

    Args:
        block: What makes a block, or a mapping of kinds to that.
        num_layers: Number of blocks, where there is one kind.
        layers: The kind of every block, in order, where there are several.
        calls: The options that say how a block is called, by name: a function, or one per kind, or None.
        make_part: ``(kind, what makes a block, **calls) -> part``, with a function or None for every option. The inputs
            of its `init` are ``(carry,)``, those of its `apply` ``(carry, mb)``.
        noun: What the adapter calls what makes a block.

    Raises:
        ConfigError: The kinds do not fit together.
    """
    several_calls = any(isinstance(call, Mapping) for call in calls.values())
    if not isinstance(block, Mapping):
        if num_layers is None or layers is not None or several_calls:
            raise ConfigError(
                f"block=… is one {noun}: it goes with num_layers=… and one {' and one '.join(calls)}; "
                "try block={kind: …, …}"
            )
        return [block_of("block", make_part("block", block, **calls))] * num_layers
    if layers is None or num_layers is not None:
        raise ConfigError(f"block={{…}} has several kinds: it goes with layers=…; try layers={list(block)}")
    if wrong := [kind for kind in layers if kind not in block]:
        raise ConfigError(f"layers names the kind {wrong[0]!r} but block={{…}} has {', '.join(map(repr, block))}")
    if unused := [kind for kind in block if kind not in layers]:
        raise ConfigError(f"block={{…}} has the kind {unused[0]!r} but layers={list(layers)} does not name it")
    by_kind: dict[str, dict[str, Any]] = {kind: {} for kind in block}
    for option, call in calls.items():
        each = dict(call) if isinstance(call, Mapping) else dict.fromkeys(block, call)
        if wrong := [kind for kind in each if kind not in block]:
            raise ConfigError(f"{option} names the kind {wrong[0]!r} but block={{…}} has {', '.join(map(repr, block))}")
        for kind in block:
            by_kind[kind][option] = each.get(kind)
    made = {kind: block_of(kind, make_part(kind, makes, **by_kind[kind])) for kind, makes in block.items()}
    return [made[kind] for kind in layers]


def block_of(kind: str, part: Part) -> Block:
    """A block: its inputs are ``(carry,)`` when it is made and ``(carry, mb)`` afterwards."""
    return Block(
        init=lambda key, carry: part.init(key, carry),
        apply=lambda params, carry, mb, key: part.apply(params, key, carry, mb),
        kind=kind,
        specs=part.specs,
    )
