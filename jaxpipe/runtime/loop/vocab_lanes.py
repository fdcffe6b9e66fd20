"""The lanes of the two ends for a vocabulary that is cut over the pipe: all devices run them together.

    E  before F   the rows of the microbatch that stage 0 takes in, looked up by all, finished on stage 0
    H  after F    the features that leave the last stage, broadcast; every device its slice of the logits; maximum, sum
                  and target logit joined; every device its slice of the kernel's gradient; the features' joined
    G  after B    the gradient of the rows that stage 0 took in, broadcast; every device adds what is in its slice

They run in the ticks in which the table says so for all devices alike, so a collective may stand inside.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.ops.losses import losses_and_gradients, losses_only, weighted_loss
from jaxpipe.runtime.layout.collect import add_up
from jaxpipe.runtime.layout.mesh import PIPE
from jaxpipe.runtime.layout.tree import drop_path, get_path, set_path
from jaxpipe.runtime.loop.device import Device
from jaxpipe.runtime.loop.end_lanes import run_head
from jaxpipe.runtime.loop.lane import Commit, Lane
from jaxpipe.runtime.model import Tree
from jaxpipe.runtime.stage import keys
from jaxpipe.runtime.stage.carry import join, part
from jaxpipe.runtime.stage.ends import accumulator_dtype, add_below, summable
from jaxpipe.runtime.stage.heads import add, loss_gradients
from jaxpipe.runtime.stage.vocab import add_rows, look_up_rows, sliced_entropy


def embed_lane(device: Device, arrived: Tree, row: dict) -> Tree:
    """The stage's input: what arrived, or on the first stage the embedded microbatch."""
    embed, context = device.model.embed, device.context(row["e_microbatch"], 0)
    first = (device.place == 0) & (row["f_repeat"] == 0)

    def run(given):
        params, context, arrived = given
        rows = _look_up(device, params, context.mb)

        def finish():
            rest = drop_path(params, embed.table)
            return device.whole(embed.finish(rest, rows, context.mb, keys.embed_key(context.group)))

        return lax.cond(first, finish, lambda: arrived), ()

    lane = Lane("embed", [run], lambda state, kept: {}, (), [])
    index = jnp.minimum(row["e_microbatch"], 0)
    _, x, _ = device.run(lane, {}, index, arrived, (device.ends["embed"], context, arrived))
    return x


def head_lane(device: Device, state: dict, row: dict, y: Tree) -> tuple[dict, list, Commit]:
    """Loss of the microbatch that leaves the last stage and, when training, its gradient."""
    head, dtype = device.model.head_loss, state["loss"].dtype
    context = device.context(row["h_microbatch"], 0)
    floating, others = part(y)
    params = device.parts.head(device.ends)
    rest, kernel = drop_path(params, head.kernel), get_path(params, head.kernel)
    size = device.parts.vocab_size
    last = row["h_gradient"] >= 0

    def run(given, entries):
        (rest, kernel), floating, others, context, seed = given
        floating = device.whole(floating)

        def features(rest, floating):
            key = keys.head_key(context.group, len(device.model.blocks))
            return head.features(rest, join(y, floating, others), context.mb, key)

        shape = jax.eval_shape(features, rest, floating)
        zeros = jnp.zeros(shape.shape, shape.dtype)
        seen = add_up(lax.cond(last, lambda: features(rest, floating), lambda: zeros), PIPE, device.simulated)
        ids, weights = head.targets(context.mb)
        entropy = sliced_entropy(len(kernel), device.place * len(kernel), size)
        chunks = head.chunks(ids.size, len(kernel))
        sums = None if entries is None or not device.trains else device.parts.head(entries["ends"])
        if device.trains:
            dlosses = loss_gradients(seen, ids, weights, size, seed)
            own = None if sums is None else get_path(sums, head.kernel)
            losses, dseen, own = losses_and_gradients(kernel, seen, ids, dlosses, own, chunks, entropy)
        else:
            losses = losses_only(kernel, seen, ids, chunks, entropy)
        total, weight, metrics = weighted_loss(losses, ids, weights, size)
        counts = last.astype(dtype)
        metrics = jax.tree.map(lambda m: m * counts.astype(m.dtype), summable(metrics)) if device.metrics else {}
        made = total.astype(dtype) * counts, weight.astype(dtype) * counts, metrics
        if not device.trains:
            return floating, (*made, None)
        dseen = add_up(dseen, PIPE, device.simulated)

        def back():
            return jax.vjp(features, rest, floating)[1](dseen)

        drest, dy = lax.cond(last, back, lambda: jax.tree.map(jnp.zeros_like, (rest, floating)))
        rest_sums = add(None if sums is None else drop_path(sums, head.kernel), drest)
        return dy, (*made, set_path(rest_sums, head.kernel, own.astype(accumulator_dtype(kernel.dtype))))

    given = (rest, kernel), floating, others, context, device.seeds[0]
    return run_head(device, state, row, jnp.minimum(row["h_microbatch"], 0), run, given)


def embed_gradient_lane(device: Device, state: dict, row: dict, dx: list) -> dict:
    """Adds up the embedding's gradient: the first stage's, and every device its rows of the table."""
    embed, context = device.model.embed, device.context(row["g_microbatch"], 0)
    first = (device.place == 0) & (row["b_repeat"] == 0)

    def run(given):
        params, context, dx = given
        dx = device.whole(dx)
        rest, rows = drop_path(params, embed.table), _look_up(device, params, context.mb)

        def finish(rest, rows):
            return part(embed.finish(rest, rows, context.mb, keys.embed_key(context.group)))[0]

        def back():
            return jax.vjp(finish, rest, rows)[1](dx)

        drest, drows = lax.cond(first, back, lambda: jax.tree.map(jnp.zeros_like, (rest, rows)))
        return (), (drest, jax.tree.map(lambda x: add_up(x, PIPE, device.simulated), drows))

    def commit(state, kept):
        drest, drows = kept
        sums = state["ends"]["embed"]
        rows, at = get_path(sums, embed.table), device.place * len(get_path(sums, embed.table))
        for ids, gradient in zip(jax.tree.leaves(embed.tokens(context.mb)), jax.tree.leaves(drows), strict=True):
            rows = add_rows(rows, ids, at, gradient)
        sums = set_path(add_below(sums, drest), embed.table, rows)
        return {"ends": state["ends"] | {"embed": sums}}

    def kept(params, mb):
        table = get_path(params, embed.table)
        rows = jax.tree.map(lambda ids: jnp.zeros((*ids.shape, table.shape[1]), table.dtype), embed.tokens(mb))
        return drop_path(params, embed.table), rows

    params = device.ends["embed"]
    lane = Lane("embed_gradient", [run], commit, jax.eval_shape(kept, params, context.mb), ["ends"])
    index = jnp.minimum(row["g_microbatch"], 0)
    state, _, commit_now = device.run(lane, state, index, (), (params, context, dx))
    return commit_now(state)


def _look_up(device: Device, params: Tree, mb: Tree) -> Tree:
    """The rows of all tokens of a microbatch, on all devices."""
    embed, size = device.model.embed, device.parts.vocab_size
    rows = get_path(params, embed.table)

    def found(ids):
        return look_up_rows(rows, ids, device.place * len(rows), size, device.simulated)

    return jax.tree.map(found, embed.tokens(mb))
