"""Cross entropy over a vocabulary, and the same without ever holding the logits of all tokens.

The logits of 8192 tokens over 131,072 words take 4.3 GB in float32, and their gradient half as much again. Above
`LOGITS_AT_ONCE` tokens are therefore taken in chunks: logits, losses, the gradient of the logits and both products with
it, chunk by chunk in one loop, the kernel's gradient added to one sum of float32. Chunks are of tokens, not of words:
the softmax of a token needs all words, so that chunks of words would compute all logits twice; and a kernel cut by
words over devices stays where it is.

Legend: N tokens, V words of the vocabulary, D width, k chunks of n tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.errors import ConfigError
from jaxpipe.ops.products import vocab_logits

LOGITS_AT_ONCE = 2**26
"""Logits that a device computes at once: 256 MiB in float32, and 128 MiB for their gradient in bfloat16."""

IGNORED = -100
"""A target that counts nothing, whatever its weight: what PyTorch ignores, and Hugging Face's collators write."""

Entropy = Callable[[Any, Any], tuple[Any, Callable[[Any], Any]]]
"""``(logits [n, V], ids [n]) -> (losses [n], gradient of losses [n] -> gradient of logits [n, V])``."""


def linear_cross_entropy(kernel, features, targets, weights=None, *, chunk: int | None = None) -> tuple:
    """Weighted cross entropy of the logits ``features @ kernel.T``, in nats, without their whole array.

    Differentiable (backwards) in kernel, features and weights. Where the logits fit into one chunk they are computed
    whole, by `vocab_logits` and `cross_entropy`; else the gradient computes them again, chunk by chunk, and adds the
    kernel's up in float32 or wider. The numbers are the same, to rounding.

    Args:
        kernel: ``[V, D]``, used in the features' dtype.
        features: ``[..., D]``.
        targets: Integers ``[...]`` in [0, V). Where one is `IGNORED` (-100) the token's weight is 0. Where the weight
            is 0 it may be anything; elsewhere one out of range gives NaN.
        weights: What each token counts, ``[...]``; by default 1.
        chunk: Tokens whose logits are computed at once. By default as many as have `LOGITS_AT_ONCE` logits: 512 with
            131,072 words.

    Returns:
        ``(loss_sum, weight, {"loss": [...]})``: what a `jaxpipe.HeadLoss`, or the `loss` of an adapter, returns. The
        last are the cross entropies, 0 where the weight is.

    Raises:
        ConfigError: Shapes that do not fit, or a chunk of no tokens.

    Example:
        >>> kernel, features, targets = jnp.ones((10, 4)), jnp.ones((2, 3, 4)), jnp.zeros((2, 3), int)
        >>> loss_sum, weight, metrics = linear_cross_entropy(kernel, features, targets, chunk=2)
        >>> print(f"{loss_sum / weight:.4f}")  # the log of 10
        2.3026
    """
    _check(kernel, features, targets, chunk)
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights
    chunks = num_chunks(targets.size, chunk or tokens_at_once(kernel.shape[0]))
    if chunks == 1:
        return cross_entropy(vocab_logits(kernel, features), targets, weights)
    return weighted_loss(_losses(kernel, features, targets, chunks), targets, weights, kernel.shape[0])


def cross_entropy(logits, ids, weights) -> tuple:
    """``(loss_sum, weight, metrics)`` of tokens with whole logits, see `linear_cross_entropy`.

    Args:
        logits: ``[..., V]``, any float dtype; computed with in float32 or wider.
        ids: Targets ``[...]``, see `linear_cross_entropy`.
        weights: ``[...]``.
    """
    return weighted_loss(token_losses(logits, ids), ids, weights, logits.shape[-1])


def token_losses(logits, ids):
    """The cross entropy of every token, from ``[..., V]`` and ``[...]``, in float32 or wider."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # A comparison instead of a gather: its gradient is elementwise, not a scatter.
    is_target = jnp.expand_dims(ids, -1) == jnp.arange(logits.shape[-1]).reshape(*[1] * ids.ndim, -1)
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(logits, axis=-1, where=is_target)


def weighted_loss(losses, ids, weights, vocab_size: int) -> tuple:
    """``(loss_sum, weight, metrics)`` from the cross entropy of every token."""
    weights = counted(ids, weights, losses.dtype)
    losses = jnp.where(in_vocabulary(ids, vocab_size), losses, jnp.nan)
    losses = jnp.where(weights != 0, losses, 0.0)
    return jnp.sum(weights * losses), weights.sum(), {"loss": losses}


def counted(ids, weights, dtype):
    """What every token counts: its weight, or 0 where the target is `IGNORED`.

    Raises:
        ConfigError: The weights have another shape than the targets, so that some would count twice or not at all.
    """
    if weights.shape != ids.shape:
        raise ConfigError(
            f"the weights (mask) of targets have shape {list(weights.shape)} but must have that of the targets; "
            f"try {list(ids.shape)}"
        )
    weights = weights.astype(dtype)
    return jnp.where(ids == IGNORED, 0, weights) if jnp.issubdtype(ids.dtype, jnp.signedinteger) else weights


def in_vocabulary(ids, vocab_size: int):
    """Where ids are in [0, V)."""
    ids = wide_ids(ids)
    return (ids >= 0) & (ids < vocab_size)


def wide_ids(ids):
    """Ids in 32 bits or more: a dtype of fewer may not hold the vocabulary's size."""
    return ids if ids.dtype.itemsize >= 4 else ids.astype(jnp.int32)


def tokens_at_once(vocab_size: int, devices: int = 1) -> int:
    """How many tokens' logits are computed at once.

    Args:
        vocab_size: V.
        devices: Those that share the logits of a token.
    """
    return max(1, LOGITS_AT_ONCE * devices // vocab_size)


def num_chunks(tokens: int, at_once: int) -> int:
    """k: the fewest chunks of at most so many tokens, or a few more if they then come out even."""
    fewest = max(1, -(-tokens // at_once))
    return next((k for k in range(fewest, 2 * fewest) if tokens % k == 0), fewest)


def losses_only(kernel, features, ids, chunks: int = 1, entropy: Entropy | None = None):
    """The losses ``[...]`` of features ``[..., D]``, computed chunk by chunk; not to be differentiated.

    Args:
        kernel: ``[V, D]``.
        features: ``[..., D]``.
        ids: ``[...]``.
        chunks: k.
        entropy: Of logits; by default over all words.
    """
    entropy, kernel = entropy or _entropy, kernel.astype(features.dtype)
    (losses,), _ = _by_chunks(
        lambda x, ids, state: ((entropy(vocab_logits(kernel, x), ids)[0],), state),
        (features.reshape(-1, features.shape[-1]), ids.reshape(-1)),
        None,
        chunks,
    )
    return losses.reshape(ids.shape)


def losses_and_gradients(kernel, features, ids, dlosses, sums=None, chunks: int = 1, entropy: Entropy | None = None):
    """The losses and, from their gradients, those of features and kernel, chunk by chunk in one loop.

    Args:
        kernel: ``[V, D]``.
        features: ``[..., D]``.
        ids: ``[...]``.
        dlosses: The gradient of the losses, ``[...]``.
        sums: What the kernel's gradient is added to, ``[V, D]``; by default zeros, of float32 or wider.
        chunks: k.
        entropy: Of logits; by default over all words.

    Returns:
        The losses ``[...]``, the gradient of the features in their dtype, and the sums with the kernel's added.
    """
    entropy, dtype = entropy or _entropy, features.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    kernel = kernel.astype(dtype)
    if chunks > 1 and sums is None:
        sums = jnp.zeros(kernel.shape, wide)

    def one(x, ids, dlosses, sums):
        losses, back = entropy(vocab_logits(kernel, x), ids)
        dlogits = back(dlosses).astype(dtype)  # [1] the operand of both products, so that they are of this dtype
        dx = lax.dot_general(dlogits, kernel, (((1,), (0,)), ((), ())))
        dkernel = lax.dot_general(dlogits, x, (((0,), (0,)), ((), ())), preferred_element_type=wide)
        return (losses, dx), dkernel if sums is None else sums + dkernel.astype(sums.dtype)

    rows = features.reshape(-1, features.shape[-1]), ids.reshape(-1), dlosses.reshape(-1)
    (losses, dx), sums = _by_chunks(one, rows, sums, chunks)
    return losses.reshape(ids.shape), dx.reshape(features.shape), sums


def _by_chunks(one: Callable, rows: tuple, state: Any, chunks: int) -> tuple[tuple, Any]:
    """Calls ``one(*rows of a chunk, state) -> (new rows, state)`` for every chunk.

    Chunk j has the rows j, j + k, j + 2k, …: where rows lie cut over devices, each device has its part of every chunk.

    Args:
        one: The function.
        rows: Arrays ``[N, ...]``.
        state: What it hands on.
        chunks: k.

    Returns:
        What `one` returns, its rows ``[N, ...]`` again.
    """
    if chunks == 1:
        return one(*rows, state)
    count = rows[0].shape[0]
    size = -(-count // chunks)

    def cut(a):
        if missing := size * chunks - count:
            a = jnp.pad(a, [(0, missing), *[(0, 0)] * (a.ndim - 1)])
        return a.reshape(size, chunks, *a.shape[1:])

    rows = tuple(map(cut, rows))

    def take(number):
        return [lax.dynamic_index_in_dim(a, number, 1, keepdims=False) for a in rows]

    def turn(carry, number):
        made, state = carry
        new, state = one(*take(number), state)
        made = [lax.dynamic_update_index_in_dim(a, b, number, 1) for a, b in zip(made, new, strict=True)]
        return (made, state), None

    shapes = jax.eval_shape(lambda: one(*take(0), state)[0])
    made = [jnp.zeros((size, chunks, *s.shape[1:]), s.dtype) for s in shapes]
    (made, state), _ = lax.scan(turn, (made, state), jnp.arange(chunks))
    return tuple(a.reshape(size * chunks, *a.shape[2:])[:count] for a in made), state


def _entropy(logits, ids):
    """`Entropy` over all words."""
    losses, vjp = jax.vjp(lambda logits: token_losses(logits, ids), logits)
    return losses, lambda dlosses: vjp(dlosses)[0]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _losses(kernel, features, ids, chunks):
    return losses_only(kernel, features, ids, chunks)


def _losses_forward(kernel, features, ids, chunks):
    return losses_only(kernel, features, ids, chunks), (kernel, features, ids)


def _losses_backward(chunks, known, dlosses):
    kernel, features, ids = known
    _, dfeatures, dkernel = losses_and_gradients(kernel, features, ids, dlosses, chunks=chunks)
    return dkernel.astype(kernel.dtype), dfeatures, None


_losses.defvjp(_losses_forward, _losses_backward)


def _check(kernel, features, targets, chunk: int | None) -> None:
    if kernel.ndim != 2 or features.shape[-1] != kernel.shape[-1]:
        raise ConfigError(
            f"kernel has shape {list(kernel.shape)} but must be [vocabulary, width of the features]; "
            f"try [{kernel.shape[0]}, {features.shape[-1]}]"
        )
    if targets.shape != features.shape[:-1]:
        raise ConfigError(
            f"targets has shape {list(targets.shape)} but must have one for each of the features; "
            f"try {list(features.shape[:-1])}"
        )
    if chunk is not None and chunk < 1:
        raise ConfigError(f"chunk={chunk} must be at least 1 token; try {tokens_at_once(kernel.shape[0])}")
