"""The lanes of the two ends: embedding, head with loss, and the embedding's gradient."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.runtime import keys, slots
from jaxpipe.runtime.carry import join, part
from jaxpipe.runtime.device import Device
from jaxpipe.runtime.ends import accumulate
from jaxpipe.runtime.heads import head_gradients, head_sums
from jaxpipe.runtime.lane import Commit, Lane
from jaxpipe.runtime.model import Tree, loss_and_metrics
from jaxpipe.runtime.stage import Context


def embed_lane(device: Device, arrived: Tree, context: Context, row: dict) -> Tree:
    """The stage's input: what arrived, or on the first stage the embedded microbatch."""
    first = (device.place == 0) & (row["f_repeat"] == 0)
    embed, key = device.model.embed.apply, keys.embed_key(context.group)
    if device.skip == "mask":
        x = device.whole(embed(device.ends["embed"], context.mb, key))
        return jax.tree.map(lambda a, b: jnp.where(first, a, b), x, arrived)
    return lax.cond(first, lambda: device.whole(embed(device.ends["embed"], context.mb, key)), lambda: arrived)


def head_lane(device: Device, state: dict, row: dict, y: Tree) -> tuple[dict, list, Commit]:
    """Loss of the microbatch that leaves the last stage and, when training, its gradient."""
    context = device.context(row["f_microbatch"], row["f_repeat"])
    head, dtype = device.parts.head(device.ends), state["loss"].dtype
    floating, others = part(y)

    def evaluate(given, _):
        head, floating, others, context, _ = given
        floating = device.whole(floating)
        key = keys.head_key(context.group, len(device.model.blocks))
        made = device.model.head_loss.apply(head, join(y, floating, others), context.mb, key)
        total, weight, metrics = loss_and_metrics(made)
        return floating, (total.astype(dtype), weight.astype(dtype), metrics if device.metrics else {}, None)

    def train(given, entries):
        head, floating, others, context, seed = given
        floating = device.whole(floating)
        key = keys.head_key(context.group, len(device.model.blocks))
        carry = partial(join, y, others=others)
        sums = None if entries is None else device.parts.head(entries["ends"])
        made = head_gradients(device.model.head_loss, head, floating, carry, context.mb, key, seed.astype(dtype), sums)
        metrics = made.metrics if device.metrics else {}
        return device.whole(made.carry), (made.loss.astype(dtype), made.weight.astype(dtype), metrics, made.sums)

    branch, given = train if device.trains else evaluate, (head, floating, others, context, device.seeds[0])
    return run_head(device, state, row, jnp.minimum(row["h_gradient"], 0), branch, given, label=("h", row), rare=True)


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
    put = device.parts.put_head if device.in_loop(rare) else device.parts.add_head
    updates = ["loss", "weight", *(["metrics"] if device.metrics else []), *(["ends"] if device.trains else [])]

    def commit(state, kept):
        total, weight, metrics, sums = kept
        out = {"loss": state["loss"] + total, "weight": state["weight"] + weight}
        if device.metrics:
            out["metrics"] = _keep_metrics(state["metrics"], row, metrics)
        return out | ({"ends": put(state["ends"], sums)} if device.trains else {})

    made = Lane("head", [branch], commit, shapes, updates, label, rare, adds=True)
    state, dy, commit_now = device.run(made, state, index, given[1], given)
    if "gradient" in state:
        state = state | {"gradient": slots.put(state["gradient"], row["h_gradient"], dy)}
    return state, dy, commit_now


def embed_gradient_lane(device: Device, state: dict, row: dict, dx: list) -> dict:
    """On the first stage, adds up the embedding's gradient."""
    apply = device.model.embed.apply

    def run(given):
        embed, context, dx = given
        _, vjp = jax.vjp(lambda p: part(apply(p, context.mb, keys.embed_key(context.group)))[0], embed)
        return (), vjp(device.whole(dx))[0]

    def commit(state, gradient):
        return {"ends": state["ends"] | {"embed": accumulate(state["ends"]["embed"], gradient)}}

    embed = device.ends["embed"]
    index = jnp.where((device.place == 0) & (row["b_repeat"] == 0), 0, -1)
    context = device.context(row["b_microbatch"], row["b_repeat"])
    lane = Lane("embed_gradient", [run], commit, embed, ["ends"], ("e", row), rare=True)
    state, _, commit_now = device.run(lane, state, index, (), (embed, context, dx))
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
