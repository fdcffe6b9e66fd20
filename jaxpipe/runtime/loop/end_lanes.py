"""The two ends: embedding, head with loss, and the embedding's gradient; as parts of other lanes, or as their own."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.runtime.loop import slots
from jaxpipe.runtime.loop.device import Device
from jaxpipe.runtime.loop.lane import Commit, Lane
from jaxpipe.runtime.model import Tree, loss_and_metrics
from jaxpipe.runtime.stage import keys
from jaxpipe.runtime.stage.carry import join, part
from jaxpipe.runtime.stage.ends import accumulate, summable
from jaxpipe.runtime.stage.heads import head_gradients, head_sums
from jaxpipe.runtime.stage.stage import Context


def embed(device: Device, params: Tree, context: Context) -> Tree:
    """The embedded microbatch."""
    return device.whole(device.model.embed.apply(params, context.mb, keys.embed_key(context.group)))


def embed_lane(device: Device, arrived: Tree, context: Context, row: dict) -> Tree:
    """The stage's input: what arrived, or on the first stage the embedded microbatch."""
    first = (device.place == 0) & (row["f_repeat"] == 0)
    if device.skip == "mask":
        x = embed(device, device.ends["embed"], context)
        return jax.tree.map(lambda a, b: jnp.where(first, a, b), x, arrived)
    return lax.cond(first, lambda: embed(device, device.ends["embed"], context), lambda: arrived)


def head(device: Device, dtype: Any, like: Tree, given: tuple, entries: dict | None) -> tuple[list, tuple]:
    """Loss of the microbatch that leaves the last stage and, when training, its gradient.

    Args:
        device: The device.
        dtype: Of the sums of losses and weights.
        like: A carry, for its structure.
        given: The head's parameters, the floating-point leaves of what leaves the last stage, its other leaves, the
            context of the microbatch, and the gradient of the loss.
        entries: The state's entries, whose sums the gradient is added to; None: to nothing.

    Returns:
        The gradient of the floating-point leaves, or they themselves when not training, and what `commit_head` takes.
    """
    params, floating, others, context, seed = given
    floating, head_loss = device.whole(floating), device.model.head_loss
    key = keys.head_key(context.group, len(device.model.blocks))
    carry = partial(join, like, others=others)
    if not device.trains:
        total, weight, metrics = loss_and_metrics(head_loss.apply(params, carry(floating), context.mb, key))
        metrics = summable(metrics) if device.metrics else {}
        return floating, (total.astype(dtype), weight.astype(dtype), metrics, None)
    sums = None if entries is None else device.parts.head(entries["ends"])
    seed = seed.astype(dtype)
    made = head_gradients(head_loss, params, floating, carry, context.mb, key, seed, sums, device.wide)
    metrics = summable(made.metrics) if device.metrics else {}
    return device.whole(made.carry), (made.loss.astype(dtype), made.weight.astype(dtype), metrics, made.sums)


def head_lane(device: Device, state: dict, row: dict, y: Tree) -> tuple[dict, list, Commit]:
    """The head in a lane of its own."""
    context, run = device.context(row["f_microbatch"], row["f_repeat"]), partial(head, device, state["loss"].dtype, y)
    given = device.parts.head(device.ends), *part(y), context, device.seeds[0]
    return run_head(device, state, row, jnp.minimum(row["h_gradient"], 0), run, given, label=("h", row), rare=True)


def run_head(
    device: Device,
    state: dict,
    row: dict,
    index: Any,
    branch: Callable,
    given: tuple,
    label: tuple[str, dict] | None = None,
    rare: bool = False,
) -> tuple[dict, list, Commit]:
    """Runs a head where `index` is not -1 and keeps what it makes.

    Args:
        device: The device.
        state: The loop's state.
        row: The row of the table.
        index: 0 or -1.
        branch: ``(given, entries) -> (gradient of the features, (loss, weight, metrics, sums))``; the sums are those of
            the head in `entries` with its gradient added, its gradient alone if `entries` is None, or None.
        given: What it reads; its second entry is passed on if it does not run.
        label: As in `Lane`.
        rare: As in `Lane`.
    """
    scalar = jax.ShapeDtypeStruct((), state["loss"].dtype)
    shapes = scalar, scalar, device.metrics, head_sums(device.parts.head(device.ends)) if device.trains else None
    commit = partial(commit_head, device, row, rare)
    made = Lane("head", [branch], commit, shapes, head_updates(device), label, rare, adds=True)
    state, dy, commit_now = device.run(made, state, index, given[1], given)
    if "gradient" in state:
        state = state | {"gradient": slots.put(state["gradient"], row["h_gradient"], dy)}
    return state, dy, commit_now


def head_updates(device: Device) -> list[str]:
    """The entries of the state that `commit_head` changes."""
    return ["loss", "weight", *(["metrics"] if device.metrics else []), *(["ends"] if device.trains else [])]


def commit_head(device: Device, row: dict, rare: bool, state: dict, made: tuple) -> dict:
    """The entries of the state with what a head made: loss, weight, metrics, and sums (None when not training)."""
    total, weight, metrics, sums = made
    put = device.parts.put_head if device.commits(rare) else device.parts.add_head
    out = {"loss": state["loss"] + total, "weight": state["weight"] + weight}
    if device.metrics:
        out["metrics"] = _keep_metrics(state["metrics"], row, metrics)
    return out | ({"ends": put(state["ends"], sums)} if device.trains else {})


def embed_gradient(device: Device, params: Tree, context: Context, dx: list) -> Tree:
    """The gradient of the embedding's parameters."""

    def run(params):
        return part(device.model.embed.apply(params, context.mb, keys.embed_key(context.group)))[0]

    return device.wide(lambda params, dx: (jax.vjp(run, params)[1](dx)[0], ()), params, device.whole(dx))[0]


def commit_embed(state: dict, gradient: Tree) -> dict:
    """The entries of the state with a gradient of the embedding added."""
    return {"ends": state["ends"] | {"embed": accumulate(state["ends"]["embed"], gradient)}}


def embed_gradient_lane(device: Device, state: dict, row: dict, dx: list) -> dict:
    """On the first stage, adds up the embedding's gradient."""

    def run(given):
        return (), embed_gradient(device, *given)

    params = device.ends["embed"]
    index = jnp.where((device.place == 0) & (row["b_repeat"] == 0), 0, -1)
    context = device.context(row["b_microbatch"], row["b_repeat"])
    lane = Lane("embed_gradient", [run], commit_embed, params, ["ends"], ("e", row), rare=True)
    state, _, commit_now = device.run(lane, state, index, (), (params, context, dx))
    return commit_now(state)


def _keep_metrics(kept: Tree, row: dict, metrics: Tree) -> Tree:
    """Numbers are added up, arrays kept by microbatch."""

    def keep(sums, new):
        if new.ndim == 0:
            return sums + new
        at = jnp.where(row["h_gradient"] >= 0, row["f_microbatch"], -1)
        return slots.put(sums, at, new)

    return jax.tree.map(keep, kept, metrics)


def start_metrics(device: Device) -> Any:
    """Where the metrics of all microbatches go."""
    microbatches = device.table.schedule.microbatches
    return jax.tree.map(lambda s: device.slots(s, microbatches) if s.shape else jnp.zeros((), s.dtype), device.metrics)
