"""What is known of every slot, and what becomes of the tokens that come back: the books, kept on the first device.

A *slot* is the place of one sequence. It is free (not live), waits for its prompt to be given to the model, has the
prompt in the ring, or decodes. All devices hold the arrays; only the first device's are true, but for the settings,
which are the same everywhere.

Shape legend: N slots, S positions of a slot, n slots that are looked at.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.infer.sampling import MAX_STOPS, SETTINGS
from jaxpipe.runtime.layout.tree import Tree


def empty_books(slots: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the books.

    `tokens` [N, S] are prompt and answer, `logprobs` [N, S] of the answer; `length` [N] of the prompt; `filled` [N]
    how much of the prompt has been given to the model; `position` [N] of the token to be fed next, -1 if there is none;
    `count` [N] tokens generated; `ticket` [N] says whose prompt goes first; `live` [N].
    """
    whole: dict[str, tuple[tuple[int, ...], Any]] = {name: ((slots,), dtype) for name, dtype in SETTINGS.items()}
    whole["stops"] = ((slots, MAX_STOPS), jnp.int32)
    whole |= {name: ((slots,), jnp.int32) for name in ("length", "filled", "position", "count", "ticket")}
    whole |= {"tokens": ((slots, length), jnp.int32), "logprobs": ((slots, length), jnp.float32)}
    whole |= {"live": ((slots,), jnp.bool_)}
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in whole.items()}


def settings_of(books: Tree, slots_n) -> dict[str, Any]:
    """The sampling settings of some slots."""
    return {name: books[name][slots_n] for name in SETTINGS}


def arrive(books: Tree, slots_n, positions_n, tokens_n, logprobs_n) -> Tree:
    """Takes in the tokens that the model wrote after those at `positions_n`; position -1 is nothing.

    A token of the prompt is kept in place of the model's; else the model's is new, and may end the sequence.
    """
    came_n = (positions_n >= 0) & books["live"][slots_n]
    next_n = positions_n + 1
    new_n = came_n & (next_n >= books["length"][slots_n])
    stops_nX = books["stops"][slots_n]
    count_n = books["count"][slots_n] + new_n
    ended_n = new_n & ((tokens_n[:, None] == stops_nX).any(-1) | (count_n >= books["max_new_tokens"][slots_n]))
    at_n = jnp.where(new_n, next_n, books["tokens"].shape[1])  # beyond: dropped
    return books | {
        "tokens": books["tokens"].at[slots_n, at_n].set(tokens_n, mode="drop"),
        "logprobs": books["logprobs"].at[slots_n, at_n].set(logprobs_n, mode="drop"),
        "count": books["count"].at[slots_n].set(count_n),
        "position": books["position"]
        .at[slots_n]
        .set(jnp.where(came_n, jnp.where(ended_n, -1, next_n), books["position"][slots_n])),
        "live": books["live"].at[slots_n].set(books["live"][slots_n] & ~ended_n),
    }


def next_prompt(books: Tree, needed_N, step: int) -> tuple[Any, Any, Tree]:
    """Which slot's prompt the model is given more of: the one with the lowest ticket.

    Args:
        books: The books.
        needed_N: How far `filled` must come.
        step: How far it comes now.

    Returns:
        The slot, -1 for none, where in the prompt, and the books.
    """
    wanted_N = books["live"] & (books["filled"] < needed_N)
    slot = jnp.argmin(jnp.where(wanted_N, books["ticket"], jnp.iinfo(jnp.int32).max)).astype(jnp.int32)
    offset, some = books["filled"][slot], wanted_N.any()
    filled = books["filled"].at[slot].add(jnp.where(some, step, 0))
    return jnp.where(some, slot, -1), offset, books | {"filled": filled}


def to_feed(books: Tree, slots_n, hold) -> tuple[Any, Any]:
    """The tokens that slots feed to the model, and their positions, -1 for none.

    Args:
        books: The books.
        slots_n: The slots.
        hold: Whether all slots wait until the prompts of all live ones are through.
    """
    waits = hold & (books["live"] & (books["position"] < 0)).any()
    ready_n = books["live"][slots_n] & (books["position"][slots_n] >= 0) & ~waits
    positions_n = jnp.where(ready_n, books["position"][slots_n], -1)
    return books["tokens"][slots_n, jnp.maximum(positions_n, 0)], positions_n


def admit(books: Tree, slot, row: Tree) -> Tree:
    """A new sequence in a free slot; nothing for slot -1.

    Args:
        books: The books.
        slot: Which.
        row: ``{"tokens" [S], "length", "ticket"}`` and the settings, of one slot.
    """
    fresh = row | {"filled": 0, "position": -1, "count": 0, "live": True}

    def put(array, value):
        at = jnp.maximum(slot, 0)
        value = jnp.where(slot < 0, array[at], jnp.asarray(value, array.dtype))
        return lax.dynamic_update_index_in_dim(array, value, at, 0)

    return {name: put(array, fresh[name]) if name in fresh else array for name, array in books.items()}


def dismiss(books: Tree, slots_N) -> Tree:
    """Slots (bools) are given up; what is in the ring for them is dropped when it comes back."""
    return books | {"live": books["live"] & ~slots_N, "position": jnp.where(slots_N, -1, books["position"])}
