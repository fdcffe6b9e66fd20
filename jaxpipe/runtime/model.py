"""The model contract: what a pipeline needs to know about a model, as plain functions.

A model is an embedding, a list of blocks and a head with a loss. Nothing here knows of stages, devices or
schedules, and nothing in a model does either: the same value is run by `Pipeline` and by `sequential`.

Words: `mb` is the batch cut to one row group (every leaf ``[rows, ...]``); `carry` is what blocks change, any
pytree of arrays; `key` is a `jax.random` key, or None for deterministic evaluation.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxpipe.errors import ConfigError, PartitionError, one_of_type
from jaxpipe.ops.losses import linear_cross_entropy, num_chunks, tokens_at_once, wide_ids
from jaxpipe.runtime.layout.mesh import TENSOR
from jaxpipe.runtime.layout.rest import tensor_dims
from jaxpipe.runtime.layout.tree import Tree, drop_path, get_path

Specs = Mapping[str, Any]
"""Partition specs by slash-separated path, or a tree of them like the parameters."""


@dataclass(frozen=True)
class Embed:
    """The way in.

    Attributes:
        init: ``(key, mb) -> params``.
        apply: ``(params, mb, key) -> carry``.
        specs: Which dims lie cut over the mesh axis `tensor`: partition specs by path, see `Model`.
    """

    init: Callable[[Any, Tree], Tree]
    apply: Callable[[Tree, Tree, Any], Tree]
    specs: Specs = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Block:
    """One transformer layer: any map whose output has the structure, shapes and dtypes of its input.

    Attributes:
        init: ``(key, carry) -> params``.
        apply: ``(params, carry, mb, key) -> carry``, or ``-> (carry, aux)`` with a scalar `aux` that joins the loss
            (see `Model`), or a dict of scalars of which `loss` does and others are only averaged (see `Losses`).
            Integer leaves of the carry (masks, positions, segment ids) travel along and have no gradient.
        kind: Blocks of equal kind have parameters of equal structure, and the same `apply` and `specs`.
        specs: Which dims lie cut over the mesh axis `tensor`: partition specs by path, see `Model`.
    """

    init: Callable[[Any, Tree], Tree]
    apply: Callable[[Tree, Tree, Tree, Any], Any]
    kind: str = "block"
    specs: Specs = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class HeadLoss:
    """The way out.

    Attributes:
        init: ``(key, carry, mb) -> params``.
        apply: ``(params, carry, mb, key) -> (loss_sum, weight)``, two scalars, or ``-> (loss_sum, weight, metrics)``.
            The loss of a batch is the sum of `loss_sum` over all row groups divided once by the sum of `weight`, so
            that any mask gives the unpipelined mean; where nothing in the batch counts, the loss is 0 and so is its
            gradient. `weight` is a constant for differentiation. `metrics` is a tree of arrays for
            ``value_and_grad(…, has_aux=True)``: leaves ``[rows, …]`` come back for the whole batch
            ``[B, …]``, scalars summed over row groups.
        specs: Which dims lie cut over the mesh axis `tensor`: partition specs by path, see `Model`.
    """

    init: Callable[[Any, Tree, Tree], Tree]
    apply: Callable[[Tree, Tree, Tree, Any], tuple]
    specs: Specs = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class VocabEmbed:
    """A way in that looks up rows of a table; ``head="vocab_parallel"`` keeps the table cut by vocabulary.

    Attributes:
        init: ``(key, mb) -> params``.
        table: Path of the table in `params`, a leaf ``[V, D]``.
        tokens: ``mb -> ids``, an array of integers in [0, V) or a tree of them.
        finish: ``(params without the table, rows, mb, key) -> carry``, with `rows` like `ids` but ``[..., D]``.
        specs: Which dims lie cut over the mesh axis `tensor`: partition specs by path, see `Model`.
    """

    init: Callable[[Any, Tree], Tree]
    table: str
    tokens: Callable[[Tree], Tree]
    finish: Callable[[Tree, Tree, Tree, Any], Tree]
    specs: Specs = field(default_factory=dict, hash=False)

    def apply(self, params: Tree, mb: Tree, key: Any) -> Tree:
        """Embeds with the whole table; NaN where a token is out of range."""
        table = get_path(params, self.table)
        rows = jax.tree.map(lambda ids: look_up(table, ids), self.tokens(mb))
        return self.finish(drop_path(params, self.table), rows, mb, key)


@dataclass(frozen=True)
class VocabHead:
    """A way out that ends in a matrix over the vocabulary and a cross entropy, which can be cut by vocabulary.

    The loss of a token is its weight times the cross entropy of its target, in nats. Logits are float32 or wider; those
    of many tokens are computed in chunks, see `jaxpipe.ops.losses`. Metrics are ``{"loss": [rows, ...]}``, the cross
    entropies.

    Attributes:
        init: ``(key, carry, mb) -> params``.
        kernel: Path of the matrix in `params`, a leaf ``[V, D]``.
        features: ``(params without the kernel, carry, mb, key) -> [rows, ..., D]``, in the dtype of the product.
        targets: ``mb -> (ids, weights)``: integers ``[rows, ...]`` in [0, V), and a float each. A target
            of -100 has weight 0 (`jaxpipe.ops.losses.IGNORED`). Where the weight is 0 the target may be anything;
            elsewhere one out of range gives NaN.
        specs: Which dims lie cut over the mesh axis `tensor`: partition specs by path, see `Model`.
        chunk: Tokens of a microbatch whose logits are computed at once. None: by the size of the vocabulary, see
            `jaxpipe.ops.losses.LOGITS_AT_ONCE`.
    """

    init: Callable[[Any, Tree, Tree], Tree]
    kernel: str
    features: Callable[[Tree, Tree, Tree, Any], Any]
    targets: Callable[[Tree], tuple[Any, Any]]
    specs: Specs = field(default_factory=dict, hash=False)
    chunk: int | None = None

    def apply(self, params: Tree, carry: Tree, mb: Tree, key: Any) -> tuple:
        """``(loss_sum, weight, metrics)`` with the whole matrix."""
        kernel = get_path(params, self.kernel)
        features = self.features(drop_path(params, self.kernel), carry, mb, key)
        return linear_cross_entropy(kernel, features, *self.targets(mb), chunk=self.at_once(len(kernel)))

    def at_once(self, vocab_size: int) -> int:
        """How many tokens' logits are computed at once; more where devices on the axis `tensor` share those of each.

        Args:
            vocab_size: Rows of the kernel on this device of `pipe`.
        """
        if self.chunk is not None:
            return self.chunk
        devices = jax.sharding.get_abstract_mesh().shape.get(TENSOR, 1)
        shared = tensor_dims(self.specs).get(self.kernel) == 0 and vocab_size % devices == 0
        return tokens_at_once(vocab_size, devices if shared else 1)

    def chunks(self, tokens: int, vocab_size: int) -> int:
        """In how many chunks the logits of so many tokens are computed."""
        return num_chunks(tokens, self.at_once(vocab_size))


def look_up(table, ids):
    """Rows of a table, NaN where an id is out of range."""
    ids = wide_ids(ids)
    return jnp.take(table, jnp.where(ids < 0, len(table), ids), axis=0, mode="fill")


@dataclass(frozen=True)
class Model:
    """An embedding, blocks and a head.

    Args:
        embed: Anything with `Embed`'s two functions.
        blocks: One `Block` per layer, in order.
        head_loss: Anything with `HeadLoss`'s two functions.
        tie: Leaves that live in the embedding, once, though others use them: ``{"head/kernel": "embed/table"}``.
            Paths are slash-separated keys; ``"blocks/KIND/bias": "embed/bias"`` shares a leaf among all blocks of a
            kind. Who uses such a leaf sees it in its own place; its gradients add up.
        aux_weight: What the blocks' `aux` count. The loss of a batch is the mean of the head's plus `aux_weight` times
            the mean over row groups of the sum of all `aux`. The head's `weight` may then depend on `mb` only.
        carry_spec: How what passes from block to block lies over `tensor`: by default whole on each of its devices.
            ``PartitionSpec(None, "tensor")`` cuts the sequence of carries ``[rows, sequence, …]``: norms and
            elementwise work are shared then, and slots and hops are smaller.
        divisible_by_tensor: What `tensor` must divide for its devices to share work evenly, by name:
            ``{"num_heads": 12}``.
        batch: What the model reads of a batch that is a dict, by name: whether it must be there. Other names are
            refused. Empty: anything, and what no function reads is warned of.

    Leaves that name no axis in their part's `specs` are whole on each device of `tensor`, and so are leaves of
    embedding and head whose dim it does not divide. ``{"up": PartitionSpec(None, "tensor"), "down":
    PartitionSpec("tensor")}`` is Megatron's MLP: what the blocks compute follows from where their weights lie.

    Raises:
        PartitionError: No blocks, or a tie with other paths.
    """

    embed: Any
    blocks: Sequence[Any]
    head_loss: Any
    tie: Mapping[str, str] = field(default_factory=dict)
    aux_weight: float = 1.0
    carry_spec: PartitionSpec = field(default_factory=PartitionSpec)
    divisible_by_tensor: Mapping[str, int] = field(default_factory=dict)
    batch: Mapping[str, bool] = field(default_factory=dict)

    def __post_init__(self):
        given = self.blocks
        blocks = tuple(given) if isinstance(given, Iterable) else (given,)
        for number, block in enumerate(blocks):
            if given is block or not all(hasattr(block, name) for name in ("init", "apply", "kind")):
                where = "blocks" if given is block else f"blocks[{number}]"
                raise PartitionError(
                    f"{where} is a {type(block).__name__} but blocks must be a list of jaxpipe.Block, one per layer; "
                    "try [Block(init, apply)] * num_layers"
                )
        object.__setattr__(self, "blocks", blocks)
        if not isinstance(self.tie, Mapping):
            raise PartitionError(f"tie={self.tie!r} must map paths to paths; try {{'head/kernel': 'embed/table'}}")
        if not self.blocks:
            raise PartitionError("blocks=[] must hold at least one block; try one per transformer layer")
        if not {axis for axis in self.carry_spec if axis} <= {"tensor"}:
            raise PartitionError(
                f"carry_spec={self.carry_spec} may name only the axis 'tensor', the others are the pipeline's; "
                'try PartitionSpec(None, "tensor")'
            )
        kinds = {f"blocks/{block.kind}/" for block in self.blocks}
        for user, source in self.tie.items():
            if not user.startswith(("head/", *kinds)) or not source.startswith("embed/"):
                allowed = " or ".join(f"'{kind}…'" for kind in sorted(kinds))
                raise PartitionError(
                    f"tie={{{user!r}: {source!r}}} must map a path 'head/…' or {allowed} to a path 'embed/…'; "
                    "try {'head/kernel': 'embed/table'}"
                )

    @property
    def head_tie(self) -> dict[str, str]:
        """The leaves of the head that live in the embedding, paths below each."""
        return self._ties("head/")

    def block_tie(self, kind: str) -> dict[str, str]:
        """The leaves of a kind of block that live in the embedding, paths below each."""
        return self._ties(f"blocks/{kind}/")

    def _ties(self, user: str) -> dict[str, str]:
        pairs = ((to, source) for to, source in self.tie.items() if to.startswith(user))
        return {to.removeprefix(user): source.removeprefix("embed/") for to, source in pairs}


def check_model(model: Any) -> Model:
    """A model as it is.

    Raises:
        ConfigError: It is something else.
    """
    near = "jaxpipe.nn.from_nnx, nnx_model or linen_model for a module of Flax's"
    one_of_type("model", model, Model, near, ConfigError)
    return model


class Losses(NamedTuple):
    """What the loss of a batch is made of.

    Attributes:
        total: What is differentiated: `head` plus `aux`.
        head: The mean of the head's losses.
        aux: What the blocks' aux adds, `Model.aux_weight` included; None where they have none.
        means: Other numbers of the blocks' aux, by name: means over the blocks that have them and over row groups.
    """

    total: Any
    head: Any
    aux: Any
    means: dict[str, Any]


def losses_of(
    model: "Model", loss, weight, aux: Mapping[str, Any], row_groups: int, counts: Mapping[str, int]
) -> Losses:
    """The loss of a batch from its sums; it is 0 where nothing in the batch counts.

    Args:
        model: The model.
        loss: Sum of the head's losses.
        weight: Sum of what they count.
        aux: Sums of the blocks' aux by name.
        row_groups: Over how many row groups.
        counts: Over how many blocks, by name.
    """
    head = mean_of(loss, weight)
    means = {name: total / (row_groups * counts[name]) for name, total in aux.items() if name != "loss"}
    if not aux:
        return Losses(head, head, None, means)
    added = jnp.where(weight == 0, 0, model.aux_weight * aux["loss"] / row_groups)
    return Losses(head + added, head, added, means)


def mean_of(total, weight):
    """A sum over a batch divided by its weight; 0 where nothing in the batch counts."""
    nothing = weight == 0
    # The divisor, too, so that nothing that is not finite comes back through the division.
    return jnp.where(nothing, 0, total / jnp.where(nothing, 1, weight))


def carry_and_aux(carry: Tree, out: Any) -> tuple[Tree, dict[str, Any]]:
    """What a block returned, as ``(carry, aux)``; `aux` is empty for a block that has none.

    Args:
        carry: What the block was given.
        out: What it returned.
    """
    pair = isinstance(out, tuple) and len(out) == 2
    if pair and jax.tree.structure(out) != jax.tree.structure(carry):
        if is_scalar(out[1]):
            return out[0], {"loss": out[1]}
        if isinstance(out[1], Mapping) and "loss" in out[1] and all(map(is_scalar, out[1].values())):
            return out[0], dict(out[1])
    return out, {}


def is_scalar(value: Any) -> bool:
    """Whether a value is one floating-point number."""
    return is_number(value) and jnp.issubdtype(jnp.result_type(value), jnp.floating)


def is_number(value: Any) -> bool:
    """Whether a value is one number, of any real type."""
    one = isinstance(value, int | float) or (hasattr(value, "dtype") and getattr(value, "shape", None) == ())
    return one and any(jnp.issubdtype(jnp.result_type(value), kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


def loss_and_metrics(out: Any) -> tuple[Any, Any, Tree]:
    """What a head returned, as ``(loss_sum, weight, metrics)``; no metrics are an empty dict.

    Raises:
        PartitionError: It returned anything but two or three values, of which the first two are scalars.
    """
    rule = "head_loss.apply must return (loss_sum, weight) or (loss_sum, weight, metrics), two scalars first, but"
    if not isinstance(out, tuple | list) or len(out) not in (2, 3):
        raise PartitionError(f"{rule} returns {_text(out)}; {_advice(out)}")
    loss, weight, *rest = out
    if not is_scalar(loss):
        near = "its sum over the rows" if getattr(loss, "shape", ()) else "a floating-point number"
        raise PartitionError(f"{rule} loss_sum is {_text(loss)}; try {near}")
    if not is_number(weight):
        raise PartitionError(f"{rule} weight is {_text(weight)}; try what the loss was summed over, as one number")
    return loss, jnp.asarray(weight), rest[0] if rest and rest[0] is not None else {}


def _text(value: Any) -> str:
    """What a function of the user's returned, in a few words."""
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(repr, value)) or 'nothing'}"
    if isinstance(value, tuple | list):
        return f"{len(value)} values" if len(value) != 1 else "1 value"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"


def _advice(out: Any) -> str:
    """How a head that returned this might return what it must."""
    if isinstance(out, Mapping):
        pairs = [name for name in out if "loss" in str(name)][:1] or ["loss_sum"]
        return f"try return out[{pairs[0]!r}], weight, metrics"
    if getattr(out, "shape", None) == ():
        return "try (loss_sum, weight), with the number of tokens or rows that the loss is a sum over"
    return "try (loss.sum(), 1.0 * loss.size)"
