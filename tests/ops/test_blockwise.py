"""Attention block by block against the plain one: values, gradients, work and memory."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.ops.attention import attend
from jaxpipe.ops.blockwise import blockwise
from jaxpipe.runtime.measure.arithmetic import dot_flops

B, H, d = 2, 4, 8
KINDS = {
    "plain": (False, None, ()),
    "causal": (True, None, ()),
    "window": (True, 5, ()),
    "padding": (False, None, ("seen",)),
    "segments": (True, None, ("segments",)),
    "bias": (True, None, ("bias",)),
    "row bias": (False, None, ("row_bias",)),
    "distances": (False, None, ("distances",)),
    "mask": (False, None, ("mask",)),
    "everything": (True, 9, ("seen", "segments", "bias", "distances", "mask")),
}


def parts(queries: int, keys: int, kv_heads: int, dtype: str, names: tuple) -> tuple[tuple, dict, dict]:
    """Queries, keys and values; what is added to scores; what hides keys."""
    numbers = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(numbers.normal(size=shape), dtype)

    three = normal(B, queries, H, d), normal(B, keys, kv_heads, d), normal(B, keys, kv_heads, d)
    made = {
        "bias": lambda: {"bias_BHTS": normal(1, H, queries, keys)},
        "row_bias": lambda: {"bias_BHTS": normal(B, 1, 1, keys)},
        "distances": lambda: {"distances_LH": normal(2 * 6 + 1, H)},
    }
    floats = {name: value for kind in names if kind in made for name, value in made[kind]().items()}
    others = {}
    if "seen" in names:
        others["seen_BS"] = jnp.arange(keys)[None] < jnp.asarray([keys, max(keys - 4, 1)])[:, None]
    if "segments" in names:
        others["segments"] = tuple(jnp.asarray([np.arange(n) // 7, np.arange(n) // 10]) for n in (queries, keys))
    if "mask" in names:
        others["mask_BHTS"] = jnp.asarray(numbers.random((1, H, queries, keys)) < 0.7)
    return three, floats, others


def plain(three, floats, others, causal, window):
    """Written down in float64 with whole scores."""
    q, k, v = (x.astype(jnp.float64) for x in three)
    k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * 0.3
    T, S = scores.shape[2:]
    at, to = np.arange(T)[:, None], np.arange(S)[None]
    if "bias_BHTS" in floats:
        scores += floats["bias_BHTS"].astype(jnp.float64)
    if "distances_LH" in floats:
        scores += floats["distances_LH"].astype(jnp.float64)[np.clip(to - at, -6, 6) + 6].transpose(2, 0, 1)[None]
    seen = jnp.ones((T, S), bool)
    seen = jnp.asarray(to <= at) if causal else seen
    seen = (seen & jnp.asarray(at - to < window) if window else seen)[None, None]
    if "seen_BS" in others:
        seen &= others["seen_BS"][:, None, None]
    if "mask_BHTS" in others:
        seen &= others["mask_BHTS"]
    if "segments" in others:
        mine, theirs = others["segments"]
        seen &= (mine[:, :, None] == theirs[:, None])[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float64).min), axis=-1) * seen
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def both(queries, keys, kv_heads, dtype, kind, longest):
    """Values and gradients block by block, and those of the definition."""
    causal, window, names = KINDS[kind]
    three, floats, others = parts(queries, keys, kv_heads, dtype, names)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=three[0].shape), dtype)

    def mine(three, floats):
        return blockwise(*three, causal=causal, window=window, scale=0.3, longest=longest, **floats, **others)

    found, expected = [], []
    for run, results in ((mine, found), (lambda t, f: plain(t, f, others, causal, window), expected)):

        @jax.jit
        def all_of(three, floats, run=run):
            y, vjp = jax.vjp(run, three, floats)
            return [y, *jax.tree.leaves(vjp(dy.astype(y.dtype)))]

        results += all_of(three, floats)
    return found, expected


CASES = [(21, 21, 2, kind) for kind in KINDS]
CASES += [(8, 29, 1, kind) for kind in KINDS if not KINDS[kind][0]]
CASES += [(24, 24, kv_heads, kind) for kv_heads, kind in itertools.product([1, 4], ["causal", "everything"])]


@pytest.mark.parametrize(("queries", "keys", "kv_heads", "kind"), CASES)
def test_values_and_gradients_are_those_of_the_definition(queries, keys, kv_heads, kind):
    with jax.enable_x64(True):
        for dtype, atol in (("float64", 1e-12), ("float32", 1e-5))[: 2 if kv_heads == 2 else 1]:
            for a, b in zip(*both(queries, keys, kv_heads, dtype, kind, longest=8), strict=True):
                np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=0, atol=atol)


@pytest.mark.parametrize(("dtype", "atol"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_half_precision_goes_too(dtype, atol):
    with jax.enable_x64(True):
        for a, b in zip(*both(24, 24, 2, dtype, "distances", longest=8), strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            np.testing.assert_allclose(a, b, rtol=0, atol=atol * abs(b).max())


def test_blocks_that_causality_or_a_window_hides_are_not_computed():
    def flops(**how):
        x = jax.ShapeDtypeStruct((1, 64, 2, 8), jnp.float32)

        def run(q, k, v):
            y, vjp = jax.vjp(lambda *three: blockwise(*three, scale=1.0, longest=8, **how), q, k, v)
            return vjp(y)

        return dot_flops(run, x, x, x)

    full = flops(causal=False)
    assert full == 7 * 2 * 64 * 64 * 2 * 8  # two products forwards, and five backwards
    assert flops(causal=True) == full * 36 / 64
    assert flops(causal=True, window=8) == full * 15 / 64


@pytest.mark.parametrize("kind", ["plain", "everything", "distances"])
@pytest.mark.parametrize("implementation", ["xla", "blockwise"])
def test_attend_hands_all_of_it_to_each_implementation(kind, implementation):
    causal, window, names = KINDS[kind]
    three, floats, others = parts(20, 20, 2, "float32", names)
    with jax.enable_x64(True):
        expected = plain(three, floats, others, causal, window)
    found = attend(*three, causal=causal, window=window, scale=0.3, implementation=implementation, **floats, **others)
    sees = np.abs(expected).max(-1) > 0  # what a query that sees nothing gets is nobody's affair
    np.testing.assert_allclose(found[sees], expected[sees], rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "blockwise"])
def test_lengths_hide_the_keys_after_them(implementation):
    q, k, v = parts(12, 12, 4, "float32", ())[0]
    found = attend(q, k, v, causal=False, lengths_B=jnp.asarray([5, 12]), implementation=implementation)
    for row, length in enumerate([5, 12]):
        short = (x[row : row + 1, :length] for x in (k, v))
        expected = attend(q[row : row + 1], *short, causal=False, implementation="xla")
        np.testing.assert_allclose(found[row], expected[0], rtol=0, atol=1e-6)
