"""What a head makes of one microbatch when training: its loss, and both gradients, in one go.

Of a `HeadLoss` only its function is known, and JAX differentiates it. Of a `VocabHead` it is known where the product
with the vocabulary is, so that its logits come and go chunk by chunk (`jaxpipe.ops.losses`) and the kernel's
gradient is added to its sum as it is made: nothing of the kernel's size is made beside the sum, nor rounded.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.ops.losses import counted, in_vocabulary, losses_and_gradients, weighted_loss
from jaxpipe.runtime.layout.tree import drop_path, get_path, set_path
from jaxpipe.runtime.model import Tree, VocabHead, loss_and_metrics
from jaxpipe.runtime.stage.ends import accumulate, accumulator_dtype


def called(backward: Callable, params: Tree, *args: Any) -> tuple[Tree, Any]:
    """What a backward returns, as it is."""
    return backward(params, *args)


class HeadGradients(NamedTuple):
    """What a head makes.

    Attributes:
        loss: The sum of its losses.
        weight: What they count.
        metrics: Its metrics; an empty dict if it has none.
        sums: What its gradient was added to, with it added.
        carry: The gradient of the floating leaves that it was given.
    """

    loss: Any
    weight: Any
    metrics: Tree
    sums: Tree
    carry: Tree


def head_sums(head: Tree) -> Tree:
    """Shapes of the sums of a head's gradient: like its parameters, float32 or wider."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, accumulator_dtype(leaf.dtype)), head)


def head_gradients(
    head_loss: Any,
    head: Tree,
    floating: Tree,
    carry: Callable[[Tree], Tree],
    mb: Tree,
    key: Any,
    seed: Any,
    sums: Any,
    wide: Callable = called,
) -> HeadGradients:
    """Runs a head and its backward.

    Args:
        head_loss: A `HeadLoss`, a `VocabHead`, or anything like them.
        head: Its parameters.
        floating: The leaves of its input that have a gradient.
        carry: ``floating -> input``.
        mb: The microbatch.
        key: A key or None.
        seed: The gradient of the loss, a scalar of the sums' dtype.
        sums: What the gradient of the parameters is added to, see `head_sums`. None: to nothing.
        wide: See `jaxpipe.runtime.loop.device.Device.wide`.
    """
    if isinstance(head_loss, VocabHead):
        return _of_vocabulary(head_loss, head, floating, carry, mb, key, seed, sums, wide)

    def loss(head, floating):
        total, weight, metrics = loss_and_metrics(head_loss.apply(head, carry(floating), mb, key))
        return total.astype(seed.dtype), (lax.stop_gradient(weight), lax.stop_gradient(metrics))

    total, vjp, (weight, metrics) = jax.vjp(loss, head, floating, has_aux=True)
    dhead, dfloating = wide(lambda _, seed: vjp(seed), head, seed)
    return HeadGradients(total, weight, metrics, add(sums, dhead), dfloating)


def _of_vocabulary(head_loss: VocabHead, head, floating, carry, mb, key, seed, sums, wide) -> HeadGradients:
    rest, kernel = drop_path(head, head_loss.kernel), get_path(head, head_loss.kernel)

    def features_of(rest, floating):
        return head_loss.features(rest, carry(floating), mb, key)

    features, vjp = jax.vjp(features_of, rest, floating)
    ids, weights = head_loss.targets(mb)
    losses, dfeatures, kernel_sums = losses_and_gradients(
        kernel,
        features,
        ids,
        loss_gradients(features, ids, weights, len(kernel), seed),
        None if sums is None else get_path(sums, head_loss.kernel),
        head_loss.chunks(ids.size, len(kernel)),
    )
    total, weight, metrics = weighted_loss(losses, ids, weights, len(kernel))
    drest, dfloating = wide(lambda _, dfeatures: vjp(dfeatures), rest, dfeatures)
    rest_sums = add(None if sums is None else drop_path(sums, head_loss.kernel), drest)
    kernel_sums = kernel_sums.astype(accumulator_dtype(kernel.dtype))
    return HeadGradients(total, weight, metrics, set_path(rest_sums, head_loss.kernel, kernel_sums), dfloating)


def loss_gradients(features, ids, weights, vocab_size: int, seed):
    """What `weighted_loss` makes of the gradient of its sum: that of every token's loss, in float32 or wider."""
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    counts = jnp.where(in_vocabulary(ids, vocab_size), counted(ids, weights, dtype), 0)
    return counts * seed.astype(dtype)


def add(sums: Tree, gradient: Tree) -> Tree:
    """The gradient in the dtypes of its sums, added to them if there are any."""
    if sums is None:
        return jax.tree.map(lambda leaf: leaf.astype(accumulator_dtype(leaf.dtype)), gradient)
    return accumulate(sums, gradient)
