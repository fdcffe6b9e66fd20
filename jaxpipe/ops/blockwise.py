"""Attention in plain JAX that never holds a T x S array, forwards or backwards.

Queries and keys are cut into blocks. A loop over pairs of blocks that may see each other keeps, for the queries it is
at, the largest score, the sum of the exponentials and the mixed values so far (online softmax). The backward keeps the
output and the logarithm of that sum only, and makes every block of scores again. Which pairs there are is known when
traced: pairs that a causal mask or a window hides whole are not in the loop, which halves causal attention.

Sources: Milakov and Gimelshein, 2018, "Online normalizer calculation for softmax"; Rabe and Staats, 2021,
"Self-attention does not need O(n²) memory"; Dao et al., 2022, "FlashAttention", whose backward this is.

Shape legend: B rows, T queries, S keys, H heads, K heads of keys and values, G = H/K, d dims of a head; in blocks N
blocks of queries of t each, M of keys of s each.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxpipe.ops.dtypes import wide

BLOCK = 512
"""The longest block: one of scores takes ``BLOCK² * heads * rows`` numbers."""

SAVED = "attention"
"""The name, for `jax.checkpoint`, of what the forward made and the backward needs."""


@dataclass(frozen=True)
class Blocks:
    """Into what blocks attention is cut, and which queries see which keys by position.

    Attributes:
        queries: T.
        keys: S.
        causal: Whether query t sees keys up to t only.
        window: With `causal`, query t sees keys t-window+1 to t only; None: all.
        scale: Multiplies the scores.
        longest: The longest block.
    """

    queries: int
    keys: int
    causal: bool
    window: int | None
    scale: float
    longest: int = BLOCK

    @property
    def t(self) -> int:
        """Queries of a block."""
        return _even(self.queries, self.longest)

    @property
    def s(self) -> int:
        """Keys of a block."""
        return _even(self.keys, self.longest)

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pairs of blocks that see each other: of queries, of keys, and whether it is the first of its queries."""
        rows = [(n, m) for n in range(-(-self.queries // self.t)) for m in self._seen_by(n)]
        at, of = (np.asarray(column, np.int32) for column in zip(*rows, strict=True))
        return at, of, np.diff(at, prepend=-1) > 0

    def _seen_by(self, n: int) -> range:
        """The blocks of keys of which a block of queries sees any."""
        num = -(-self.keys // self.s)
        if not self.causal:
            return range(num)
        first, last = n * self.t, min((n + 1) * self.t, self.queries) - 1
        oldest = 0 if self.window is None else max(first - self.window + 1, 0)
        return range(oldest // self.s, min(last // self.s + 1, num))

    def visible(self, n, m):
        """Which queries of a block see which keys of another by position, [t, s]."""
        queries_ts = n * self.t + jnp.arange(self.t)[:, None]
        keys_ts = m * self.s + jnp.arange(self.s)[None]
        seen_ts = jnp.broadcast_to(keys_ts < self.keys, (self.t, self.s))
        if self.causal:
            seen_ts &= keys_ts <= queries_ts
        if self.window is not None:
            seen_ts &= queries_ts - keys_ts < self.window
        return seen_ts


def blockwise(
    q_BTHd,
    k_BSKd,
    v_BSKd,
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    bias_BHTS=None,
    distances_LH=None,
    mask_BHTS=None,
    seen_BS=None,
    segments: tuple | None = None,
    longest: int = BLOCK,
):
    """Attention block by block, its softmax in float32 or wider.

    Args:
        q_BTHd: Queries, any float dtype.
        k_BSKd: Keys; each of the K heads serves H/K consecutive heads of queries.
        v_BSKd: Values.
        causal: Whether query t sees keys up to t only (T = S then).
        scale: Multiplies the scores.
        window: With `causal`, query t sees keys t-window+1 to t only.
        bias_BHTS: Added to the scaled scores; dims may be 1.
        distances_LH: Added too: entry D + clip(s - t, -D, D) of 2D + 1, float.
        mask_BHTS: Bools, False for a key that a query must not see; dims may be 1.
        seen_BS: Bools, False for a key that no query may see.
        segments: Integers [B, T] and [B, S]: a query sees keys of its own segment only.
        longest: The longest block.

    Returns:
        [B, T, H, d], like the queries; zeros for a query that may see nothing.
    """
    blocks = Blocks(q_BTHd.shape[1], k_BSKd.shape[1], causal, window, scale, longest)
    given = {"bias": bias_BHTS, "distances": distances_LH, "mask": mask_BHTS, "seen": seen_BS, "segments": segments}
    floats = {name: given[name] for name in ("bias", "distances") if given[name] is not None}
    others = {name: given[name] for name in ("mask", "seen", "segments") if given[name] is not None}
    return _attend(blocks, q_BTHd, k_BSKd, v_BSKd, floats, others)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(blocks: Blocks, q_BTHd, k_BSKd, v_BSKd, floats: dict, others: dict):
    return _forward(blocks, q_BTHd, k_BSKd, v_BSKd, floats, others)[0]


def _forward(blocks: Blocks, q_BTHd, k_BSKd, v_BSKd, floats: dict, others: dict):
    """The output, and what the backward needs."""
    view = View(blocks, q_BTHd, k_BSKd, v_BSKd, floats, others)
    out, lse = view.forward()
    out_BTHd = checkpoint_name(view.whole_queries(out).astype(q_BTHd.dtype), SAVED)
    return out_BTHd, (q_BTHd, k_BSKd, v_BSKd, floats, others, out_BTHd, checkpoint_name(lse, SAVED))


def _backward(blocks: Blocks, kept: tuple, dy_BTHd):
    q_BTHd, k_BSKd, v_BSKd, floats, others, out_BTHd, lse = kept
    view = View(blocks, q_BTHd, k_BSKd, v_BSKd, floats, others)
    dq, dk, dv, dfloats = view.backward(out_BTHd, lse, dy_BTHd)
    grads = view.whole_queries(dq), view.whole_keys(dk), view.whole_keys(dv), dfloats
    wanted = q_BTHd, k_BSKd, v_BSKd, floats
    return *jax.tree.map(lambda grad, x: grad.astype(x.dtype), grads, wanted), None


_attend.defvjp(_forward, _backward)


class View:
    """Queries, keys and values cut into blocks, and the two loops over pairs of them."""

    def __init__(self, blocks: Blocks, q_BTHd, k_BSKd, v_BSKd, floats: dict, others: dict):
        self.blocks, self.floats, self.others = blocks, _padded(blocks, floats), _padded(blocks, others)
        self.dtype = wide(q_BTHd.dtype)
        self.kv_heads, self.per_head = k_BSKd.shape[2], q_BTHd.shape[2] // k_BSKd.shape[2]
        self.q_NBKGtd = self.cut_queries(q_BTHd)
        self.k_MBKsd, self.v_MBKsd = (_cut(x, blocks.s).swapaxes(2, 3).astype(q_BTHd.dtype) for x in (k_BSKd, v_BSKd))

    def cut_queries(self, x_BTHd):
        """[B, T, H, d] -> [N, B, K, G, t, d]."""
        x_NBtHd = _cut(x_BTHd, self.blocks.t)
        N, B, t, _, d = x_NBtHd.shape
        return x_NBtHd.reshape(N, B, t, self.kv_heads, self.per_head, d).transpose(0, 1, 3, 4, 2, 5)

    def whole_queries(self, x_NBKGtd):
        """[N, B, K, G, t, d] -> [B, T, H, d]."""
        N, B, K, G, t, d = x_NBKGtd.shape
        return x_NBKGtd.transpose(1, 0, 4, 2, 3, 5).reshape(B, N * t, K * G, d)[:, : self.blocks.queries]

    def whole_keys(self, x_MBKsd):
        """[M, B, K, s, d] -> [B, S, K, d]."""
        M, B, K, s, d = x_MBKsd.shape
        return x_MBKsd.transpose(1, 0, 3, 2, 4).reshape(B, M * s, K, d)[:, : self.blocks.keys]

    def forward(self):
        """The output [N, B, K, G, t, d], and of the scores the logarithm of the sum of exponentials [N, B, K, G, t]."""
        N, B, K, G, t, d = self.q_NBKGtd.shape
        lowest = jnp.finfo(self.dtype).min

        def turn(state, pair):
            n, m, fresh = pair
            (most, total, mixed), out, lse = state
            most, total, mixed = jnp.where(fresh, lowest, most), jnp.where(fresh, 0, total), jnp.where(fresh, 0, mixed)
            scores, seen = self.scores(n, m)
            new = jnp.maximum(most, jnp.where(seen, scores, lowest).max(-1))
            weights, fade = jnp.where(seen, jnp.exp(scores - new[..., None]), 0), jnp.exp(most - new)
            total = total * fade + weights.sum(-1)
            mixed = mixed * fade[..., None] + self.product("bkgts,bksd->bkgtd", weights, self.v_MBKsd[m])
            some = jnp.where(total == 0, 1, total)
            out = out.at[n].set((mixed / some[..., None]).astype(out.dtype))
            # A query that sees nothing has weights of 0 in the backward, whatever stands here.
            return ((new, total, mixed), out, lse.at[n].set(new + jnp.log(some))), None

        running = tuple(jnp.zeros(shape, self.dtype) for shape in ((B, K, G, t), (B, K, G, t), (B, K, G, t, d)))
        whole = jnp.zeros_like(self.q_NBKGtd), jnp.zeros((N, B, K, G, t), self.dtype)
        (_, out, lse), _ = lax.scan(turn, (running, *whole), self.blocks.pairs())
        return out, lse

    def backward(self, out_BTHd, lse, dy_BTHd):
        """Gradients of queries, keys and values in blocks, and those of what is added to the scores, all wide."""
        dy = self.cut_queries(dy_BTHd)
        own = (self.cut_queries(out_BTHd).astype(self.dtype) * dy.astype(self.dtype)).sum(-1)
        scale = self.blocks.scale

        def turn(sums, pair):
            n, m, _ = pair
            dq, dk, dv, dfloats = sums
            scores, seen = self.scores(n, m)
            weights = jnp.where(seen, jnp.exp(scores - lse[n][..., None]), 0)
            dweights = self.product("bkgtd,bksd->bkgts", dy[n], self.v_MBKsd[m])
            dscores = weights * (dweights - own[n][..., None])
            dq = dq.at[n].add(scale * self.product("bkgts,bksd->bkgtd", dscores, self.k_MBKsd[m]))
            dk = dk.at[m].add(scale * self.product("bkgts,bkgtd->bksd", dscores, self.q_NBKGtd[n]))
            dv = dv.at[m].add(self.product("bkgts,bkgtd->bksd", weights, dy[n]))
            B, K, G, t, s = dscores.shape
            dfloats = self.add_floats(dfloats, n, m, dscores.reshape(B, K * G, t, s))
            return (dq, dk, dv, dfloats), None

        sums = self.q_NBKGtd, self.k_MBKsd, self.v_MBKsd, self.floats
        sums = jax.tree.map(lambda x: jnp.zeros(x.shape, self.dtype), sums)
        (dq, dk, dv, dfloats), _ = lax.scan(turn, sums, self.blocks.pairs())
        if "bias" in dfloats:  # padding goes; a dim of 1 stays
            dfloats["bias"] = dfloats["bias"][:, :, : self.blocks.queries, : self.blocks.keys]
        return dq, dk, dv, dfloats

    def scores(self, n, m):
        """Scaled scores of a pair of blocks with all that is added to them, and which of them count.

        [B, K, G, t, s], the second with dims that may be 1.
        """
        t, s = self.blocks.t, self.blocks.s
        scores = self.product("bkgtd,bksd->bkgts", self.q_NBKGtd[n], self.k_MBKsd[m]) * self.blocks.scale
        if "bias" in self.floats:
            scores += self.by_heads(self.piece(self.floats["bias"], n, m).astype(self.dtype))
        if "distances" in self.floats:
            scores += self.by_heads(by_distance(self.floats["distances"].astype(self.dtype), t, s, m * s - n * t))
        seen = self.blocks.visible(n, m)[None, None, None]
        if "mask" in self.others:
            seen &= self.by_heads(self.piece(self.others["mask"], n, m))
        if "seen" in self.others:
            seen &= lax.dynamic_slice_in_dim(self.others["seen"], m * s, s, 1)[:, None, None, None]
        if "segments" in self.others:
            of_queries, of_keys = self.others["segments"]
            mine_Bt1 = lax.dynamic_slice_in_dim(of_queries, n * t, t, 1)[:, :, None]
            theirs_B1s = lax.dynamic_slice_in_dim(of_keys, m * s, s, 1)[:, None]
            seen &= (mine_Bt1 == theirs_B1s)[:, None, None]
        return scores, seen

    def add_floats(self, sums: dict, n, m, dscores_BHts) -> dict:
        """The gradients of what is added to the scores, with those of a pair of blocks added."""
        sums = dict(sums)
        if "bias" in sums:
            bias = sums["bias"]
            piece = self.piece(bias, n, m)
            summed = tuple(dim for dim, size in enumerate(piece.shape) if size == 1)
            new = piece + dscores_BHts.sum(summed, keepdims=True)
            sums["bias"] = lax.dynamic_update_slice(bias, new, self.place(bias, n, m))
        if "distances" in sums:
            t, s = self.blocks.t, self.blocks.s
            _, vjp = jax.vjp(lambda x: by_distance(x, t, s, m * s - n * t), sums["distances"])
            sums["distances"] += vjp(dscores_BHts.sum(0, keepdims=True))[0]
        return sums

    def place(self, x_BHTS, n, m) -> tuple:
        """Where a pair of blocks begins in an array with dims that may be 1."""
        zero = jnp.zeros_like(n)
        rows, columns = x_BHTS.shape[2] > 1, x_BHTS.shape[3] > 1
        return zero, zero, n * self.blocks.t if rows else zero, m * self.blocks.s if columns else zero

    def piece(self, x_BHTS, n, m):
        """The part of such an array that belongs to a pair of blocks."""
        _, _, T, S = x_BHTS.shape
        size = *x_BHTS.shape[:2], self.blocks.t if T > 1 else 1, self.blocks.s if S > 1 else 1
        return lax.dynamic_slice(x_BHTS, self.place(x_BHTS, n, m), size)

    def by_heads(self, x_BHts):
        """[B, 1 or H, t, s] -> [B, 1 or K, 1 or G, t, s]."""
        B, H, t, s = x_BHts.shape
        return x_BHts.reshape(B, *((1, 1) if H == 1 else (self.kv_heads, self.per_head)), t, s)

    def product(self, how: str, a, b):
        """A product of operands in the dtype of the queries, summed up wide."""
        dtype = self.q_NBKGtd.dtype
        return jnp.einsum(how, a.astype(dtype), b.astype(dtype), preferred_element_type=self.dtype)


def by_distance(distances_LH, num_queries: int, num_keys: int, first=0):
    """What distances add to the scores of consecutive queries and keys.

    Args:
        distances_LH: Entry D + clip(distance, -D, D) of 2D + 1, the distance from a query to a key after it.
        num_queries: t.
        num_keys: s.
        first: From the first query to the first key.

    Returns:
        [1, H, t, s].
    """
    # Entry (t, s) depends on s - t only: t + s distances are looked up, 0, 1, …, -2, -1, and row t is this circle
    # turned right by t. Laid end to end and cut one entry shorter, each row starts one later.
    circle = np.concatenate([np.arange(num_keys), np.arange(-num_queries, 0)]).astype(np.int32)
    (num_distances, num_heads), length = distances_LH.shape, num_queries + num_keys
    farthest = num_distances // 2
    at_C = jnp.clip(first + circle, -farthest, farthest) + farthest
    rows_HtC = jnp.broadcast_to(distances_LH[at_C].T[:, None], (num_heads, num_queries, length))
    flat_HC = rows_HtC.reshape(num_heads, -1)[:, : num_queries * (length - 1)]
    return flat_HC.reshape(1, num_heads, num_queries, length - 1)[..., :num_keys]


def _cut(x_BTHd, block: int):
    """[B, T, H, d] -> [N, B, block, H, d], zeros at the end."""
    B, T, H, d = x_BTHd.shape
    N = -(-T // block)
    x_BTHd = jnp.pad(x_BTHd, ((0, 0), (0, N * block - T), (0, 0), (0, 0)))
    return x_BTHd.reshape(B, N, block, H, d).swapaxes(0, 1)


def _padded(blocks: Blocks, given: dict) -> dict:
    """Arrays over queries and keys, as long as all blocks together; dims of 1 stay."""
    T, S = (-(-size // block) * block for size, block in ((blocks.queries, blocks.t), (blocks.keys, blocks.s)))

    def longer(x, *dims: tuple[int, int]):
        sizes = dict(dims)
        return jnp.pad(x, [(0, sizes[dim] - size if dim in sizes else 0) for dim, size in enumerate(x.shape)])

    made = dict(given)
    for name in made.keys() & {"bias", "mask"}:
        dims = [(dim, size) for dim, size in ((2, T), (3, S)) if given[name].shape[dim] > 1]
        made[name] = longer(given[name], *dims)
    if "seen" in made:
        made["seen"] = longer(given["seen"], (1, S))
    if "segments" in made:
        made["segments"] = tuple(longer(x, (1, size)) for x, size in zip(given["segments"], (T, S), strict=True))
    return made


def _even(length: int, longest: int) -> int:
    """The size of equal blocks of at most `longest` that cover a length with little to spare."""
    count = -(-length // longest)
    return min(longest, -(-length // count // 8) * 8) if count > 1 else length
