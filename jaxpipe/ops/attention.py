"""Attention, by whichever implementation fits, on any mesh.

`attend` is for users' own blocks too: it may be called in the blocks of a pipeline whatever the mesh, where a bare
``jax.nn.dot_product_attention(implementation="cudnn")`` fails if the axis `tensor` has several devices.

Shape legend: B rows, T queries, S keys, H heads, K heads of keys and values, d dims of a head, L distances.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxpipe.jax_internals import cudnn_checks
from jaxpipe.ops.attention_choice import Requested, capability_here, choose, is_present
from jaxpipe.ops.blockwise import blockwise, by_distance
from jaxpipe.ops.dtypes import wide
from jaxpipe.ops.tensor import TENSOR, tensor_devices

ABSENT_CUDNN = 91000
"""The version of cuDNN, 9.10, on machines that programs are only compiled for."""

HEADS = {"bias": 1, "distances": 1, "mask": 1}
"""The dim of heads of what comes beside queries, keys and values; the rest has none."""


def attend(
    q_BTHd,
    k_BSKd,
    v_BSKd,
    *,
    causal: bool,
    bias_BHTS=None,
    distances_LH=None,
    mask_BHTS=None,
    seen_BS=None,
    segments: tuple | None = None,
    lengths_B=None,
    scale: float | None = None,
    window: int | None = None,
    implementation: Requested = "auto",
):
    """Attention, its softmax in float32 or wider.

    Args:
        q_BTHd: Queries, any float dtype.
        k_BSKd: Keys; each of the K heads serves H/K consecutive heads of queries.
        v_BSKd: Values.
        causal: Whether query t sees keys up to t only (T = S then).
        bias_BHTS: Added to the scaled scores; dims may be 1.
        distances_LH: Added too: entry D + clip(s - t, -D, D) of L = 2D + 1. Takes no memory quadratic in T.
        mask_BHTS: Bools, False for a key that a query must not see; dims may be 1. A query that may see nothing gets
            some finite value, here and below.
        seen_BS: Bools, False for a key that no query may see, such as padding.
        segments: Integers [B, T] and [B, S]: a query sees keys of its own segment only.
        lengths_B: Integers: keys from here on nobody may see; what `seen_BS` says too, in a form that cuDNN knows.
        scale: Multiplies the scores. None: 1/sqrt(d).
        window: With `causal`, query t sees keys t-window+1 to t only.
        implementation: ``xla`` for whole scores; ``cudnn`` for the fused kernel of NVIDIA GPUs; ``blockwise`` for
            plain JAX that holds no T x S array; ``auto``: see `jaxpipe.ops.attention_choice.choose`.

    Returns:
        [B, T, H, d].
    """
    given = {"bias": bias_BHTS, "distances": distances_LH, "mask": mask_BHTS, "seen": seen_BS, "segments": segments}
    given["lengths"] = lengths_B
    given = {name: value for name, value in given.items() if value is not None}
    how: dict[str, Any] = {"causal": causal, "window": window}
    how["scale"] = 1 / math.sqrt(q_BTHd.shape[-1]) if scale is None else scale
    masks = given.keys() & {"mask", "seen", "segments"}
    chosen = choose(
        implementation,
        capability=capability_here(),
        dtype=q_BTHd.dtype,
        head_dim=q_BTHd.shape[-1],
        queries=q_BTHd.shape[1],
        keys=k_BSKd.shape[1],
        biased="bias" in given or "distances" in given,
        masked=bool(masks),
    ).name
    if "lengths" in given and (chosen != "cudnn" or masks):
        in_time_BS = jnp.arange(k_BSKd.shape[1])[None] < given.pop("lengths")[:, None]
        given["seen"] = in_time_BS & given["seen"] if "seen" in given else in_time_BS
    if chosen == "xla" and k_BSKd.shape[2] % tensor_devices() == 0:
        return _whole(q_BTHd, k_BSKd, v_BSKd, given, how)  # which the compiler cuts by heads as well
    run = {"xla": _whole, "cudnn": _fused, "blockwise": _by_blocks}[chosen]
    return on_all_axes(lambda q, k, v, given: run(q, k, v, given, how), q_BTHd, k_BSKd, v_BSKd, given)


def on_all_axes(run: Callable, q_BTHd, k_BSKd, v_BSKd, given: dict):
    """Calls ``run(q, k, v, given)`` where no axis of the mesh is left to the compiler, or none is not.

    Within a `shard_map` that is manual over some axes it is made so over the others too, by heads over `tensor`. Heads
    of keys and values that `tensor` does not divide are repeated so that every device has those of its queries; if it
    does not divide the heads of the queries either, every device computes them all.

    Args:
        run: The attention.
        q_BTHd: Queries.
        k_BSKd: Keys.
        v_BSKd: Values.
        given: More arrays, by the names in `HEADS` and others without a dim of heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    left = set(mesh.axis_names) - set(mesh.manual_axes)
    if not left or not mesh.manual_axes:
        return run(q_BTHd, k_BSKd, v_BSKd, given)
    size, num_heads, kv_heads = mesh.shape.get(TENSOR, 1), q_BTHd.shape[2], k_BSKd.shape[2]
    by_heads = TENSOR in left and num_heads % size == 0

    def spec(name: str, value: Any):
        cut = by_heads and name in HEADS and value.shape[HEADS[name]] > 1
        return PartitionSpec(*[None] * HEADS[name], TENSOR) if cut else PartitionSpec()

    heads = PartitionSpec(None, None, TENSOR) if by_heads else PartitionSpec()
    if by_heads and kv_heads % size:
        k_BSKd, v_BSKd = (jnp.repeat(x, math.lcm(kv_heads, size) // kv_heads, axis=2) for x in (k_BSKd, v_BSKd))
    return jax.shard_map(
        run,
        in_specs=(heads, heads, heads, {name: spec(name, value) for name, value in given.items()}),
        out_specs=heads,
        axis_names=left,
        check_vma=False,
    )(q_BTHd, k_BSKd, v_BSKd, given)


def _by_blocks(q_BTHd, k_BSKd, v_BSKd, given: dict, how: dict):
    return blockwise(
        q_BTHd,
        k_BSKd,
        v_BSKd,
        bias_BHTS=given.get("bias"),
        distances_LH=given.get("distances"),
        mask_BHTS=given.get("mask"),
        seen_BS=given.get("seen"),
        segments=given.get("segments"),
        **how,
    )


def _fused(q_BTHd, k_BSKd, v_BSKd, given: dict, how: dict):
    """By cuDNN, which knows causality, windows and lengths; the rest it takes as one bias [1 or B, 1 or H, T, S]."""
    bias_BHTS, mask_BHTS = _whole_bias(q_BTHd, k_BSKd, given), _whole_mask(given)
    shape = q_BTHd.shape[1], k_BSKd.shape[1]
    if bias_BHTS is not None:
        bias_BHTS = jnp.broadcast_to(bias_BHTS, (*bias_BHTS.shape[:2], *shape)).astype(q_BTHd.dtype)
    if mask_BHTS is not None:
        mask_BHTS = jnp.broadcast_to(mask_BHTS, (*mask_BHTS.shape[:2], *shape))
    with _checks_of_absent_devices():
        return _jax_attention(
            q_BTHd, k_BSKd, v_BSKd, bias_BHTS, mask_BHTS, how, "cudnn", key_value_seq_lengths=given.get("lengths")
        )


@contextmanager
def _checks_of_absent_devices() -> Iterator[None]:
    """Lets a program be traced for GPUs that are not there: JAX asks the present machine which cuDNN it has."""
    checks = cudnn_checks()
    meant, original = jax.sharding.get_abstract_mesh().abstract_device, checks.check_cudnn_version
    if meant is not None and not is_present(meant):
        checks.check_cudnn_version = lambda: ABSENT_CUDNN
    try:
        yield
    finally:
        checks.check_cudnn_version = original


def _whole(q_BTHd, k_BSKd, v_BSKd, given: dict, how: dict):
    """With all scores in memory at once."""
    bias_BHTS, mask_BHTS = _whole_bias(q_BTHd, k_BSKd, given), _whole_mask(given)
    if q_BTHd.dtype in (jnp.float32, jnp.bfloat16):
        return _jax_attention(q_BTHd, k_BSKd, v_BSKd, bias_BHTS, mask_BHTS, how, "xla")
    # jax.nn rounds the softmax to float32 even for float64, and asks for products in float16 that CPUs do not have.
    dtype, window = wide(q_BTHd.dtype), how["window"]
    k_BSHd, v_BSHd = (jnp.repeat(x, q_BTHd.shape[2] // x.shape[2], axis=2) for x in (k_BSKd, v_BSKd))
    scores_BHTS = jnp.einsum("bthd,bshd->bhts", q_BTHd, k_BSHd, preferred_element_type=dtype) * how["scale"]
    if bias_BHTS is not None:
        scores_BHTS += bias_BHTS
    seen_BHTS = jnp.ones((1, 1, *scores_BHTS.shape[2:]), bool)
    seen_BHTS = jnp.tril(seen_BHTS) if how["causal"] else seen_BHTS
    seen_BHTS = seen_BHTS & ~jnp.tril(seen_BHTS, -window) if window is not None else seen_BHTS
    seen_BHTS = seen_BHTS if mask_BHTS is None else seen_BHTS & mask_BHTS
    probs_BHTS = jax.nn.softmax(jnp.where(seen_BHTS, scores_BHTS, jnp.finfo(dtype).min), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", probs_BHTS.astype(v_BSHd.dtype), v_BSHd)


def _jax_attention(q_BTHd, k_BSKd, v_BSKd, bias_BHTS, mask_BHTS, how: dict, implementation: Any, **more: Any):
    window = how["window"]
    return jax.nn.dot_product_attention(
        q_BTHd,
        k_BSKd,
        v_BSKd,
        bias_BHTS,
        mask_BHTS,
        scale=how["scale"],
        is_causal=how["causal"],
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
        **more,
    )


def _whole_bias(q_BTHd, k_BSKd, given: dict):
    """All that is added to the scores as one array, or None."""
    bias_BHTS = given.get("bias")
    if "distances" not in given:
        return bias_BHTS
    added_1HTS = by_distance(given["distances"], q_BTHd.shape[1], k_BSKd.shape[1])
    return added_1HTS if bias_BHTS is None else bias_BHTS + added_1HTS


def _whole_mask(given: dict):
    """All that hides keys as one array with dims that may be 1, or None."""
    masks = [given["mask"]] if "mask" in given else []
    if "seen" in given:
        masks.append(given["seen"][:, None, None])
    if "segments" in given:
        of_queries_BT, of_keys_BS = given["segments"]
        masks.append((of_queries_BT[:, :, None] == of_keys_BS[:, None])[:, None])
    return None if not masks else jax.tree.reduce(jnp.logical_and, masks)
