"""Text continued from a prompt by the trained model, unpipelined on one device."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Logits = Callable[[Any, jax.Array], jax.Array]
"""``(params, tokens int32 [1, W]) -> logits [1, W, vocab]``, causal."""


def continue_tokens(logits: Logits, params, prompt, *, length: int, window: int, temperature: float, key) -> np.ndarray:
    """Draws tokens one after the other; the model sees the last `window` tokens of what is there.

    One program of fixed shape does it all: it runs the model over the whole window for every token, which is simple
    and enough for a sample, not a way to serve a model.

    Args:
        logits: The model.
        params: What it takes.
        prompt: Token ids ``[N]``, N ≥ 1; the last `window` count.
        length: Tokens to draw.
        window: W, tokens that the model sees at most.
        temperature: Divides the logits; 0 takes the likeliest token.
        key: A `jax.random` key.

    Returns:
        The drawn tokens, int32 ``[length]``.
    """
    prompt = np.asarray(prompt, np.int32)[-window:]
    seen = np.zeros(window, np.int32)
    seen[: len(prompt)] = prompt
    draw = jax.jit(partial(_draw, logits, length, temperature))
    return np.asarray(draw(params, jnp.asarray(seen), len(prompt), key))


def _draw(logits: Logits, length: int, temperature: float, params, seen, filled, key):
    """Fills the window from the left; once it is full, every new token pushes the oldest out.

    The places to the right of `filled` hold zeros, which a causal model cannot see from `filled - 1`.
    """

    def draw_one(carry, step):
        seen_W, filled = carry
        last_V = logits(params, seen_W[None])[0, filled - 1].astype(jnp.float32)
        if temperature:
            token = jax.random.categorical(jax.random.fold_in(key, step), last_V / temperature)
        else:
            token = jnp.argmax(last_V)
        token = token.astype(jnp.int32)
        full = filled == seen_W.shape[0]
        shifted = jnp.where(full, jnp.roll(seen_W, -1), seen_W)
        filled = jnp.where(full, filled, filled + 1)
        return (shifted.at[filled - 1].set(token), filled), token

    _, drawn = jax.lax.scan(draw_one, (seen, jnp.asarray(filled)), jnp.arange(length))
    return drawn
