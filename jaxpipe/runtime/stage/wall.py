"""Walls between blocks, for XLA's CPU backend.

That backend fuses elementwise work into everything that reads it and computes it anew for each reader. The gradient
that runs down the residual stream is elementwise work on the outputs of all later blocks, and every block reads it
several times: without walls a stage's backward grows with the square of its depth. Barriers do not help, for they are
gone when the fusing starts. A loop stays: one that turns as often as a number says that XLA cannot know to be 0.

GPUs write the residual stream to memory once and need no walls; a loop would cost them a round trip to the host.
"""

from typing import Any

import jax
from jax import lax, numpy as jnp


@jax.custom_vjp
def wall(turns: Any, values: list) -> list:
    """The values, and the same for their gradients: nothing is fused across.

    Args:
        turns: An int32 scalar that is 0, but not as a constant.
        values: Floating-point arrays.
    """
    return _pass(turns, values)


def _pass(turns, values: list) -> list:
    def turn(state):
        return state[0] + 1, [-x for x in state[1]]

    return lax.while_loop(lambda state: state[0] < turns, turn, (jnp.int32(0), values))[1]


wall.defvjp(
    lambda turns, values: (_pass(turns, values), turns), lambda turns, gradients: (None, _pass(turns, gradients))
)
