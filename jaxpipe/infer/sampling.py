"""How the next token is chosen from the model's logits: what a request asks for, and the same for many rows at once.

Every row has its own settings, as arrays, so that requests that want different things share one program, and what comes
out for a row does not depend on the rows beside it.

Shape legend: R rows, V vocabulary.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpipe.documents import shown
from jaxpipe.errors import ConfigError

MAX_STOPS = 8
"""Stop tokens that a row has room for."""
TINY = float(np.finfo(np.float32).tiny)
"""The smallest number that devices tell from 0."""
NUMBERS = {
    "temperature": (0.0, 1e6, 0.0),
    "top_p": (0.0, 1.0, 1.0),
    "min_p": (0.0, 1.0, 0.0),
    "repetition_penalty": (0.01, 100.0, 1.0),
}
"""Least and largest value, and the one that does nothing, of the settings that are numbers."""
WHOLE_NUMBERS = {"top_k": (0, 2**31 - 1), "seed": (0, 2**32 - 1), "max_new_tokens": (1, 2**31 - 1)}
"""Least and largest value of those that are whole numbers."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen and when to stop.

    The order is: repetition penalty; temperature; `top_k`; `top_p` of what that leaves; `min_p`. Tokens as likely as
    the last one kept are kept too.

    Attributes:
        temperature: Divides the logits. 0 takes the likeliest token, of several the first, and the next three do
            nothing.
        top_k: Keep the so many likeliest tokens; 0: all.
        top_p: Keep the fewest likeliest tokens that have this probability together (Holtzman et al., 2020).
        min_p: Drop tokens less likely than this share of the likeliest one (Nguyen et al., 2024).
        repetition_penalty: Divides positive logits, and multiplies negative ones, of tokens that are in the sequence,
            prompt and all (Keskar et al., 2019).
        seed: The token at a position is drawn with the key ``fold_in(key(seed), position)``, whatever else runs. Of n
            sequences the i-th is drawn with ``seed + i``.
        max_new_tokens: Tokens to generate at most.
        stop_token_ids: Tokens that end the sequence, and are its last; at most 8.
        logprobs: Whether to return the logarithm of the probability of each token that was chosen, under the model
            itself: before penalty, temperature and filters.

    Raises:
        ConfigError: A value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_new_tokens: int = 64
    stop_token_ids: tuple[int, ...] = ()
    logprobs: bool = False

    def __post_init__(self):
        for name, (low, high, near) in NUMBERS.items():
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, _NUMBER) or not low <= value <= high:
                raise ConfigError(f"{name}={shown(value)} must be a number from {low:g} to {high:g}; try {near}")
        if not self.top_p > 0:
            raise ConfigError(f"top_p={self.top_p!r} must be above 0; try 1.0")
        for name, (low, high) in WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if not _whole(value) or not low <= value <= high:
                raise ConfigError(
                    f"{name}={shown(value)} must be a whole number of at least {low} and at most {high}; try {low}"
                )
        if not isinstance(self.logprobs, bool):
            raise ConfigError(f"logprobs={shown(self.logprobs)} must be True or False; try True")
        self._check_stops()

    def _check_stops(self):
        given: Any = self.stop_token_ids
        stops: tuple[Any, ...] = (
            tuple(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes) else (given,)
        )
        if not all(_whole(stop) and 0 <= stop < 2**31 for stop in stops):
            raise ConfigError(
                f"stop_token_ids={shown(given)} must be token ids, whole numbers of at least 0 and below 2**31; try ()"
            )
        if len(stops) > MAX_STOPS:
            raise ConfigError(
                f"stop_token_ids has {len(stops)} tokens but may have {MAX_STOPS}; try {stops[:MAX_STOPS]}"
            )
        object.__setattr__(self, "stop_token_ids", stops)

    def row(self, number: int = 0) -> dict[str, np.ndarray]:
        """The settings as the arrays of one row, see `settings`.

        Args:
            number: Of several sequences of one request, which it is.
        """
        stops = np.full(MAX_STOPS, -1, np.int32)
        stops[: len(self.stop_token_ids)] = self.stop_token_ids
        values = (
            self.temperature if self.temperature >= TINY else 0.0,  # what float32 cannot hold is the limit: greedy
            self.top_k,
            max(self.top_p, TINY),
            self.min_p,
            self.repetition_penalty,
            (self.seed + number) % 2**32,
            self.max_new_tokens,
            stops,
        )
        return {name: np.asarray(value, dtype) for (name, dtype), value in zip(SETTINGS.items(), values, strict=True)}


SETTINGS: dict[str, Any] = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "repetition_penalty": np.float32,
    "seed": np.uint32,
    "max_new_tokens": np.int32,
    "stops": np.int32,
}
"""The settings of rows, by name, with their dtypes: each [R], `stops` [R, MAX_STOPS]."""


def draw(logits_RV, settings: Mapping[str, Any], seen_RV, positions_R):
    """The next token of each row.

    Args:
        logits_RV: The model's, float32 or wider.
        settings: As `SETTINGS` says.
        seen_RV: Bools, True for the tokens of a row's sequence.
        positions_R: Of the tokens that are to be drawn.

    Returns:
        The tokens, int32 [R], and the logarithms of their probabilities under the model, float32 [R].
    """
    penalty_R, temperature_R = settings["repetition_penalty"], settings["temperature"]
    scores_RV = lax.cond(
        jnp.any(penalty_R != 1), lambda: penalise(logits_RV, seen_RV, penalty_R[:, None]), lambda: logits_RV
    )
    likeliest_R = jnp.argmax(scores_RV, axis=-1).astype(jnp.int32)
    drawn_R = lax.cond(
        jnp.any(temperature_R > 0),
        lambda: _sample(scores_RV.astype(jnp.float32), settings, positions_R),
        lambda: likeliest_R,
    )
    tokens_R = jnp.where(temperature_R > 0, drawn_R, likeliest_R)
    chosen_R = jnp.take_along_axis(logits_RV, tokens_R[:, None], axis=-1)[:, 0]
    return tokens_R, (chosen_R - jax.nn.logsumexp(logits_RV, axis=-1)).astype(jnp.float32)


def penalise(logits_RV, seen_RV, penalty_R1):
    """Logits with those of seen tokens made less likely, for a penalty above 1."""
    penalty_R1 = penalty_R1.astype(logits_RV.dtype)
    return jnp.where(seen_RV, jnp.where(logits_RV > 0, logits_RV / penalty_R1, logits_RV * penalty_R1), logits_RV)


def _sample(scores_RV, settings: Mapping[str, Any], positions_R):
    """One token of each row by the Gumbel trick, among those that are kept; anything where temperature is 0."""
    temperature_R = settings["temperature"]
    # The likeliest becomes 0 and stays it, however small the temperature: nothing overflows to where all are alike.
    scores_RV = scores_RV - scores_RV.max(-1, keepdims=True)
    scores_RV = scores_RV / jnp.where(temperature_R > 0, temperature_R, 1.0)[:, None]
    top_k_R, top_p_R = settings["top_k"], settings["top_p"]
    kept_RV = lax.cond(
        jnp.any((top_k_R > 0) | (top_p_R < 1)),
        lambda: kept(scores_RV, top_k_R, top_p_R),
        lambda: jnp.ones(scores_RV.shape, bool),
    )
    kept_RV &= scores_RV >= scores_RV.max(-1, keepdims=True) + jnp.log(settings["min_p"])[:, None]

    def noise(seed, position):
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), scores_RV.shape[1:])

    noisy_RV = scores_RV + jax.vmap(noise)(settings["seed"], positions_R)
    return jnp.argmax(jnp.where(kept_RV, noisy_RV, -jnp.inf), axis=-1).astype(jnp.int32)


def kept(scores_RV, top_k_R, top_p_R):
    """Which tokens `top_k` and then `top_p` keep, bools [R, V].

    Nothing is sorted: the score of the last token kept is found bit by bit, from the highest, by counting how many
    tokens, or how much probability, a threshold would keep. That is 32 sums over the vocabulary, which may lie cut
    over devices.
    """
    order_RV = _ordered(scores_RV)

    def last_kept(enough):
        """The highest threshold [R, 1] that keeps enough; ``enough(bools [R, V]) -> bools [R]``."""

        def one_bit(n, threshold_R1):
            higher_R1 = threshold_R1 | jnp.uint32(1) << (31 - n).astype(jnp.uint32)
            return jnp.where(enough(order_RV >= higher_R1)[:, None], higher_R1, threshold_R1)

        return lax.fori_loop(0, 32, one_bit, jnp.zeros((len(scores_RV), 1), jnp.uint32))

    count_R = jnp.where(top_k_R > 0, jnp.minimum(top_k_R, scores_RV.shape[1]), scores_RV.shape[1])
    kept_RV = order_RV >= last_kept(lambda keeps_RV: keeps_RV.sum(-1) >= count_R)
    probs_RV = jax.nn.softmax(jnp.where(kept_RV, scores_RV, -jnp.inf), axis=-1)
    nucleus_RV = order_RV >= last_kept(lambda keeps_RV: jnp.sum(probs_RV, axis=-1, where=keeps_RV) >= top_p_R)
    return kept_RV & (nucleus_RV | (top_p_R >= 1)[:, None])


def _ordered(x):
    """Float32 as uint32 of the same order."""
    bits = lax.bitcast_convert_type(x + 0.0, jnp.uint32)  # -0.0 becomes 0.0
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


_NUMBER = (int, float, np.integer, np.floating)


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
