"""What the layers of every model are made of: initial values, linear maps, attention, rotary positions.

Weights carry Flax's own annotations of the mesh axis that they may be cut over: columns of what leads into heads or
hidden dims, rows of what leads back (Shoeybi et al., 2019, "Megatron-LM"). They say where weights may lie and change
nothing by themselves.

Shape legend: B rows, T positions (queries), S positions (keys), H heads, d dims of a head.
"""

import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

TENSOR = "tensor"
"""The mesh axis in annotations."""


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


def wide(dtype: Any) -> Any:
    """Float32, or float64 for float64: what norms, softmax, rotation and logits are computed in."""
    return jnp.promote_types(dtype, jnp.float32)


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


def attend(
    q_BTHd,
    k_BSHd,
    v_BSHd,
    *,
    causal: bool,
    bias_BHTS=None,
    mask_BHTS=None,
    scale: float | None = None,
    implementation: Literal["xla", "cudnn"] = "xla",
):
    """Attention, its softmax in float32 or wider.

    Args:
        q_BTHd: Queries, any float dtype.
        k_BSHd: Keys.
        v_BSHd: Values.
        causal: Whether query t sees keys up to t only (T = S then).
        bias_BHTS: Added to the scaled scores; dims may be 1.
        mask_BHTS: Bools, False for a key that a query must not see; dims may be 1. A query that may see nothing gets
            some finite value.
        scale: Multiplies the scores. None: 1/sqrt(d).
        implementation: ``cudnn`` for the fused kernel of NVIDIA GPUs.

    Returns:
        [B, T, H, d].
    """
    if q_BTHd.dtype in (jnp.float32, jnp.bfloat16):
        return jax.nn.dot_product_attention(
            q_BTHd,
            k_BSHd,
            v_BSHd,
            bias_BHTS,
            mask_BHTS,
            scale=scale,
            is_causal=causal,
            implementation=implementation,
        )
    # jax.nn rounds the softmax to float32 even for float64, and asks for products in float16 that CPUs do not have.
    dtype = wide(q_BTHd.dtype)
    scores_BHTS = jnp.einsum("bthd,bshd->bhts", q_BTHd, k_BSHd, preferred_element_type=dtype)
    scores_BHTS *= 1 / math.sqrt(q_BTHd.shape[-1]) if scale is None else scale
    if bias_BHTS is not None:
        scores_BHTS += bias_BHTS
    seen_BHTS = jnp.ones((1, 1, *scores_BHTS.shape[2:]), bool)
    seen_BHTS = jnp.tril(seen_BHTS) if causal else seen_BHTS
    seen_BHTS = seen_BHTS if mask_BHTS is None else seen_BHTS & mask_BHTS
    probs_BHTS = jax.nn.softmax(jnp.where(seen_BHTS, scores_BHTS, jnp.finfo(dtype).min), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", probs_BHTS.astype(v_BSHd.dtype), v_BSHd)


def rotate(x_BTHd, positions_T, base: float = 10000.0):
    """Rotates queries or keys by their positions.

    Args:
        x_BTHd: Any float dtype, d even. Dims i and i + d/2 are a pair, turned by ``position * base**(-2i/d)``.
        positions_T: Integers.
        base: Base of the wavelengths.

    Returns:
        Like `x_BTHd`. The scalar product of two rotated vectors depends on the difference of their positions only.

    Source: Su et al., 2021, "RoFormer". There neighbouring dims are a pair; here the halves, as in GPT-NeoX and Llama.
    """
    half = x_BTHd.shape[-1] // 2
    dtype = wide(x_BTHd.dtype)
    angle_Td = positions_T[:, None].astype(dtype) * (base ** (-jnp.arange(half, dtype=dtype) / half))[None]
    cos, sin = jnp.cos(angle_Td)[None, :, None], jnp.sin(angle_Td)[None, :, None]
    a, b = x_BTHd[..., :half].astype(dtype), x_BTHd[..., half:].astype(dtype)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHd.dtype)
