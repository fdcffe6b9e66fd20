"""What `draw` draws, against the definitions worked out one row at a time with sorting."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.errors import ConfigError
from jaxpipe.infer import Sampling
from jaxpipe.infer.sampling import draw, kept

ROWS = [
    Sampling(),
    Sampling(temperature=0.7, seed=1),
    Sampling(temperature=1.3, top_k=5, seed=2),
    Sampling(temperature=1.0, top_p=0.6, seed=3),
    Sampling(temperature=2.0, min_p=0.2, seed=4),
    Sampling(temperature=0.9, top_k=12, top_p=0.8, min_p=0.05, repetition_penalty=1.5, seed=5),
    Sampling(repetition_penalty=3.0),
    Sampling(temperature=1.0, top_k=1, seed=2**32 - 1),
]
VOCAB = 50


def settings(rows):
    return {name: jnp.stack([row.row()[name] for row in rows]) for name in rows[0].row()}


@pytest.fixture(scope="module")
def drawn():
    """``(logits, seen, positions) -> (tokens, logprobs)`` for `ROWS`, compiled once."""
    return jax.jit(lambda *args: draw(args[0], settings(ROWS), *args[1:]))


def inputs(seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (len(ROWS), VOCAB)).astype(np.float32)
    return logits, rng.random((len(ROWS), VOCAB)) < 0.3, rng.integers(0, 100, len(ROWS))


def allowed(row: Sampling, logits, seen) -> tuple[np.ndarray, np.ndarray]:
    """Scaled scores, and which tokens are kept."""
    p = row.repetition_penalty
    scores = np.where(seen, np.where(logits > 0, logits / p, logits * p), logits).astype(np.float64)
    scores /= row.temperature or 1.0
    keep = np.ones(VOCAB, bool)
    if row.top_k:
        keep &= scores >= np.sort(scores)[-row.top_k]
    probs = np.where(keep, np.exp(scores - scores.max()), 0)
    probs /= probs.sum()
    if row.top_p < 1:
        order = np.argsort(-probs)
        last = np.searchsorted(np.cumsum(probs[order]), row.top_p)
        keep &= probs >= probs[order[last]]
    return scores, keep & (np.exp(scores - scores.max()) >= row.min_p)


@pytest.mark.parametrize("seed", range(3))
def test_a_draw_is_the_definition_worked_out(drawn, seed):
    logits, seen, positions = inputs(seed)
    tokens, logprobs = drawn(logits, seen, positions)
    for n, row in enumerate(ROWS):
        scores, keep = allowed(row, logits[n], seen[n])
        if row.temperature:
            key = jax.random.fold_in(jax.random.key(row.seed), int(positions[n]))
            scores = scores + np.asarray(jax.random.gumbel(key, (VOCAB,)), np.float64)
        assert tokens[n] == np.argmax(np.where(keep, scores, -np.inf)), row
        expected = logits[n] - np.log(np.exp(logits[n].astype(np.float64)).sum())
        assert logprobs[n] == pytest.approx(expected[tokens[n]], abs=1e-5)


def test_draws_follow_the_distribution():
    row, count = Sampling(temperature=0.8, top_k=4, seed=7), 4000
    logits, seen, _ = inputs(0)
    scores, keep = allowed(row, logits[0], seen[0])
    probs = np.where(keep, np.exp(scores - scores.max()), 0)
    positions = jnp.arange(count)
    many = {name: jnp.broadcast_to(value, (count, *value.shape)) for name, value in row.row().items()}
    logits, seen = (jnp.broadcast_to(x[0], (count, VOCAB)) for x in (logits, seen))
    tokens, _ = jax.jit(draw)(logits, many, seen, positions)
    shares = np.bincount(tokens, minlength=VOCAB) / count
    np.testing.assert_allclose(shares, probs / probs.sum(), atol=0.03)


def test_ties_at_the_edge_are_kept():
    scores = jnp.array([[3.0, 1.0, 1.0, 0.0, -1.0]])
    assert kept(scores, jnp.array([2]), jnp.ones(1)).tolist() == [[True, True, True, False, False]]


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ({"temperature": -1.0}, "try 0.0"),
        ({"temperature": float("nan")}, "try 0.0"),
        ({"top_k": -1}, "try 0"),
        ({"top_k": 1.5}, "try 0"),
        ({"top_p": 0.0}, "try 1.0"),
        ({"min_p": 1.5}, "try 0.0"),
        ({"repetition_penalty": 0.0}, "try 1.0"),
        ({"seed": 2**32}, "try 0"),
        ({"max_new_tokens": 0}, "try 1"),
        ({"stop_token_ids": tuple(range(9))}, "may have 8"),
        ({"stop_token_ids": (-1,)}, "whole numbers"),
        ({"stop_token_ids": (2**31,)}, "whole numbers"),
        ({"stop_token_ids": "END"}, "token ids"),
        ({"temperature": "0.5"}, "try 0.0"),
        ({"temperature": True}, "try 0.0"),
        ({"temperature": 1e300}, "try 0.0"),
        ({"temperature": 10**400}, "try 0.0"),
        ({"top_k": 2**31}, "at most 2147483647; try 0"),
        ({"top_k": "5"}, "try 0"),
        ({"top_p": None}, "try 1.0"),
        ({"repetition_penalty": 1e-30}, "try 1.0"),
        ({"max_new_tokens": 2**31}, "at most 2147483647"),
        ({"logprobs": "yes"}, "True or False"),
    ],
)
def test_a_wrong_setting_is_named(wrong, near):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}.*{near}"):
        replace(Sampling(), **wrong)


NARROW = [{}, {"top_k": 2}, {"top_p": 1e-44}, {"top_p": 0.5}, {"min_p": 1.0}, {"top_k": 2**31 - 1}]


@pytest.mark.parametrize("temperature", [1e-3, 1e-37, 1e-40, 5e-324])
@pytest.mark.parametrize("other", NARROW, ids=str)
def test_a_temperature_near_zero_takes_the_likeliest_token(temperature, other):
    scores = jnp.array([[-4e4, 1e4, 3.0e4, 2.9e4, -jnp.inf]])
    settings = {name: value[None] for name, value in Sampling(temperature=temperature, **other).row().items()}
    token, logprob = draw(scores, settings, scores > 1e5, jnp.zeros(1, int))
    assert (token.tolist(), logprob.tolist()) == ([2], [0.0])
