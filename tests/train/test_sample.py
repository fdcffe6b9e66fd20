"""The sampler against a model whose continuation is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.train.report.sample import continue_tokens

VOCAB, WINDOW = 50, 8


def count_up(step, tokens):
    """Predicts the token `step` above the last; its logits at a place depend on nothing to the right of it."""
    return 100.0 * jax.nn.one_hot((tokens + step) % VOCAB, VOCAB)


def sum_of_window(_, tokens):
    """Predicts the sum of all tokens up to each place: tells what the model was shown."""
    return 100.0 * jax.nn.one_hot(jnp.cumsum(tokens, axis=1) % VOCAB, VOCAB)


def draw(logits, prompt, length, params=1, temperature=0.0, seed=0):
    key = jax.random.key(seed)
    return continue_tokens(
        logits, params, prompt, length=length, window=WINDOW, temperature=temperature, key=key
    ).tolist()


@pytest.mark.parametrize("length", [1, 3, 5, 6, 20])
def test_continues_within_and_past_the_window(length):
    assert draw(count_up, [5, 6, 7], length) == [(8 + i) % VOCAB for i in range(length)]


def test_the_model_sees_the_last_window_of_tokens():
    text = [1, 2, 3]
    for _ in range(12):
        text.append(sum(text[-WINDOW:]) % VOCAB)
    assert draw(sum_of_window, [1, 2, 3], 12) == text[3:]


def test_of_a_long_prompt_the_end_counts():
    prompt = list(range(20))
    assert draw(sum_of_window, prompt, 1) == [sum(prompt[-WINDOW:]) % VOCAB]


def test_temperature_draws_from_the_distribution():
    logits = lambda _, tokens: jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.25, 0.25])), (*tokens.shape, 3))  # noqa: E731
    drawn = np.bincount(draw(logits, [0], 2000, temperature=1.0), minlength=3) / 2000
    np.testing.assert_allclose(drawn, [0.5, 0.25, 0.25], atol=0.05)  # 4.5 standard deviations
    cold = np.bincount(draw(logits, [0], 2000, temperature=0.25), minlength=3) / 2000
    assert cold[0] > 0.8  # 16/18


def test_equal_keys_give_equal_samples():
    logits = lambda _, tokens: jnp.zeros((*tokens.shape, VOCAB))  # noqa: E731
    assert draw(logits, [0], 10, temperature=1.0) == draw(logits, [0], 10, temperature=1.0)
    assert draw(logits, [0], 10, temperature=1.0) != draw(logits, [0], 10, temperature=1.0, seed=1)
