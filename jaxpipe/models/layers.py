"""What the layers of every model are made of: initial values, linear maps, attention, rotary positions.

Weights carry Flax's own annotations of the mesh axis that they may be cut over: columns of what leads into heads or
hidden dims, rows of what leads back (Shoeybi et al., 2019, "Megatron-LM"). They say where weights may lie and change
nothing by themselves.

Shape legend: B rows, T positions (queries), S positions (keys), H heads, K heads of keys and values, d dims of a head;
while decoding R rows, C new tokens of each.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from jaxpipe.flax_nnx import nnx
from jaxpipe.ops.attention_choice import LONG
from jaxpipe.ops.dtypes import wide
from jaxpipe.ops.tensor import TENSOR, tensor_devices


def cut(value: jax.Array, dim: int) -> nnx.Param:
    """A parameter with an annotation: it may be cut over `TENSOR` in this dim."""
    names: list[str | None] = [None] * value.ndim
    names[dim] = TENSOR
    return nnx.Param(value, out_sharding=tuple(names), eager_sharding=False)


def enter(x_BTD, cut: bool):
    """Into matrix products that are cut over `TENSOR`, where sequences are `cut` between them: whole sequences; their
    gradient is cut again. Without such a mesh it does nothing.

    Source: Korthikanti et al., 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.2.2,
    the operator g; `leave` is its conjugate.
    """
    return _relaid(x_BTD, False, True) if cut else x_BTD


def leave(x_BTD, cut: bool):
    """Out of the matrix products: sequences are cut again, and their gradient is whole, see `enter`."""
    return _relaid(x_BTD, True, False) if cut else x_BTD


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _relaid(x_BTD, there: bool, back: bool):
    return _lay(x_BTD, there)


_relaid.defvjp(lambda x, there, back: (_lay(x, there), None), lambda there, back, _, dx: (_lay(dx, back),))


def _lay(x_BTD, cut: bool):
    """Cuts the sequence over `TENSOR`, or makes it whole, if the mesh has that axis and it divides."""
    mesh = jax.sharding.get_abstract_mesh()
    size = mesh.shape.get(TENSOR, 1)
    if size == 1 or x_BTD.shape[1] % size:
        return x_BTD
    spec = PartitionSpec(None, TENSOR) if cut else PartitionSpec()
    return jax.lax.with_sharding_constraint(x_BTD, NamedSharding(mesh, spec))


def lay(x, dim: int | None):
    """Cuts `dim` over `TENSOR`, or makes an array whole on each of its devices, and its gradient likewise.

    Does nothing unless `tensor_devices` are several. Said of both ends of a move, it is a gather or a slice; left to
    itself XLA may choose a permute, which in a lane that not all devices run would wait forever.
    """
    if tensor_devices() == 1:
        return x
    spec = PartitionSpec() if dim is None else PartitionSpec(*[None] * dim, TENSOR)
    return jax.lax.with_sharding_constraint(x, NamedSharding(jax.sharding.get_abstract_mesh(), spec))


def gather(x_BTN):
    """Columns that devices of `TENSOR` have a part of each, whole on all; see `lay`.

    What ``remat="none"`` keeps is each device's part. The gradient is gathered in `I` if a backward is split, and W is
    handed a part of it again.
    """
    return lay(_columns(x_BTN), None)


@jax.custom_vjp
def _columns(x_BTN):
    return lay(x_BTN, 2)


_columns.defvjp(lambda x: (lay(x, 2), None), lambda _, dx: (checkpoint_name(lay(dx, 2), "columns"),))


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], *, std: float, dtype: Any) -> jax.Array:
    """Normal numbers with mean 0."""
    return std * jax.random.normal(rngs.params(), shape, dtype)


def linear(
    num_in: int,
    num_out: int,
    *,
    std: float,
    bias: bool,
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
    rows: bool = False,
) -> nnx.Linear:
    """A linear layer that starts with normal weights and a bias of zeros.

    Its kernel may be cut over `TENSOR` by columns, and the bias with it; or by rows, and the bias stays whole.
    """
    layer = nnx.Linear(
        num_in,
        num_out,
        use_bias=bias,
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(param_dtype),
        kernel_init=nnx.initializers.normal(std),
        rngs=rngs,
    )
    layer.kernel = cut(layer.kernel.get_value(), dim=0 if rows else 1)
    if layer.bias is not None and not rows:
        layer.bias = cut(layer.bias.get_value(), dim=0)
    return layer


def rms_norm(dims: int, *, eps: float, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """A norm with a scale and no bias that computes, and answers, in float32 or wider."""
    return nnx.RMSNorm(dims, epsilon=eps, dtype=wide(dtype), param_dtype=jnp.dtype(param_dtype), rngs=rngs)


def attend_cached(
    q_RCHd, new: dict, cache: dict, positions_RC, *, bias=None, scale: float | None = None, window: int | None = None
):
    """Causal attention of new tokens to a cache and to each other. The cache is read only, and never copied.

    Args:
        q_RCHd: Queries, any float dtype.
        new: ``{"k", "v"}`` of the new tokens, [R, K, C, d].
        cache: ``{"k", "v"}`` [R, K, S, d]: entry s belongs to position s.
        positions_RC: Of the new tokens, consecutive in each row. Only entries before the first are looked at.
        bias: ``(queries [R, C], keys [R, S]) -> [R, H, C, S]``: what positions add to the scaled scores.
        scale: Multiplies the scores. None: 1/sqrt(d).
        window: A token sees itself and the ``window - 1`` before it only.

    Returns:
        [R, C, H, d], like the queries; something finite where a row has no position.
    """
    (R, C), S = positions_RC.shape, cache["k"].shape[2]
    old_RS = jnp.broadcast_to(jnp.arange(S), (R, S))
    first_R1 = positions_RC[:, :1]

    def some(q_RcHd, at_Rc, order_c):
        """Of some of the new tokens; `order` is their place among all of them."""

        def score(k_RKSd, at_RS, seen_RcS):
            scores_RKGcS = _scores(q_RcHd, k_RKSd, scale)
            if bias is not None:
                scores_RKGcS += bias(at_Rc, at_RS).reshape(scores_RKGcS.shape).astype(scores_RKGcS.dtype)
            if window is not None:
                seen_RcS &= at_Rc[:, :, None] - at_RS[:, None] < window
            return jnp.where(seen_RcS[:, None, None], scores_RKGcS, jnp.finfo(scores_RKGcS.dtype).min)

        num = len(order_c)
        before_RcS = jnp.broadcast_to((old_RS < first_R1)[:, None], (R, num, S))
        among_RcC = jnp.broadcast_to(jnp.arange(C)[None, None] <= order_c[None, :, None], (R, num, C))
        scores = [score(cache["k"], old_RS, before_RcS), score(new["k"], positions_RC, among_RcC)]
        probs = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q_RcHd.dtype)
        y_RcKGd = _mixed(probs[..., :S], cache["v"]) + _mixed(probs[..., S:], new["v"])
        return y_RcKGd.reshape(q_RcHd.shape).astype(q_RcHd.dtype)

    return _by_some_queries(some, S + C, q_RCHd, positions_RC)


def attend_kept(q_RCHd, k_RKSd, v_RKSd, mask_RS, *, scale: float | None = None):
    """Attention to all of what is kept of another sequence, [R, C, H, d]; a False in the mask is a key nobody sees."""

    def some(q_RcHd, *_):
        scores_RKGcS = _scores(q_RcHd, k_RKSd, scale)
        scores_RKGcS = jnp.where(mask_RS[:, None, None, None], scores_RKGcS, jnp.finfo(scores_RKGcS.dtype).min)
        probs_RKGcS = jax.nn.softmax(scores_RKGcS, axis=-1).astype(q_RcHd.dtype)
        return _mixed(probs_RKGcS, v_RKSd).reshape(q_RcHd.shape).astype(q_RcHd.dtype)

    return _by_some_queries(some, k_RKSd.shape[2], q_RCHd, jnp.zeros(q_RCHd.shape[:2], jnp.int32))


def _by_some_queries(some: Callable, num_keys: int, q_RCHd, positions_RC):
    """``some(queries, positions, order)`` of all queries, or of as many at once as have at most `LONG` scores."""
    C = q_RCHd.shape[1]
    count = -(-C // max(LONG // num_keys, 1))
    if count == 1:
        return some(q_RCHd, positions_RC, jnp.arange(C))
    num = -(-C // count)

    def pieces(x):
        x = jnp.pad(x, [(0, 0), (0, count * num - C), *[(0, 0)] * (x.ndim - 2)])
        return x.reshape(x.shape[0], count, num, *x.shape[2:]).swapaxes(0, 1)

    orders = jnp.arange(count * num).reshape(count, num)
    y = jax.lax.map(lambda piece: some(*piece), (pieces(q_RCHd), pieces(positions_RC), orders))
    return y.swapaxes(0, 1).reshape(y.shape[1], count * num, *y.shape[3:])[:, :C]


def _scores(q_RCHd, k_RKSd, scale: float | None):
    """Scaled scores [R, K, G, C, S], float32 or wider: each head of keys serves G of queries."""
    (R, C, H, d), K = q_RCHd.shape, k_RKSd.shape[1]
    q_RCKGd = q_RCHd.reshape(R, C, K, H // K, d)
    k_RKSd = k_RKSd.astype(q_RCHd.dtype)
    scores_RKGCS = jnp.einsum("rckgd,rksd->rkgcs", q_RCKGd, k_RKSd, preferred_element_type=wide(q_RCHd.dtype))
    return scores_RKGCS * (1 / math.sqrt(d) if scale is None else scale)


def _mixed(probs_RKGCS, v_RKSd):
    """Values by their probabilities, [R, C, K, G, d], float32 or wider."""
    v_RKSd = v_RKSd.astype(probs_RKGCS.dtype)
    return jnp.einsum("rkgcs,rksd->rckgd", probs_RKGCS, v_RKSd, preferred_element_type=wide(probs_RKGCS.dtype))


@dataclass(frozen=True)
class Rotary:
    """How queries and keys are rotated by their positions.

    Attributes:
        base: Base of the wavelengths: dims i and i + d/2 are a pair, turned by ``position * base**(-2i/d)``.
        factor: Wavelengths far above ``original_len`` are stretched by this.
        low_freq_factor: Those above ``original_len`` over this by all of it.
        high_freq_factor: Those below ``original_len`` over this not at all, those between in part.
        original_len: The longest sequence before the stretching.

    Source: Su et al., 2021, "RoFormer". There neighbouring dims are a pair; here the halves, as in GPT-NeoX and Llama.
    The stretching is Llama 3.1's (Grattafiori et al., 2024, "The Llama 3 Herd of Models", and its reference code).
    """

    base: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_len: int = 8192

    def frequencies(self, half: int, dtype: Any) -> jax.Array:
        """Radians per position of every pair, [half]."""
        turn_d = self.base ** (-jnp.arange(half, dtype=dtype) / half)
        if self.factor == 1.0:
            return turn_d
        turns_d = self.original_len * turn_d / (2 * math.pi)  # whole turns in the original length
        kept_d = (turns_d - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept_d = jnp.clip(kept_d, 0, 1)
        return turn_d * (kept_d + (1 - kept_d) / self.factor)

    def __call__(self, x_BTHd, positions_BT):
        """Rotates queries or keys.

        Args:
            x_BTHd: Any float dtype, d even.
            positions_BT: Integers; B may be 1.

        Returns:
            Like `x_BTHd`. The scalar product of two rotated vectors depends on the difference of their positions only.
        """
        half, dtype = x_BTHd.shape[-1] // 2, wide(x_BTHd.dtype)
        angle_BTd = positions_BT[..., None].astype(dtype) * self.frequencies(half, dtype)[None, None]
        cos, sin = jnp.cos(angle_BTd)[:, :, None], jnp.sin(angle_BTd)[:, :, None]
        a, b = x_BTHd[..., :half].astype(dtype), x_BTHd[..., half:].astype(dtype)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHd.dtype)
