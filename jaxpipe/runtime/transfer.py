"""Hops between neighbours, and the barriers that keep them in flight while a lane computes.

One `ppermute` per direction that a phase uses: an open chain, or a ring when activations wrap around. XLA
places a permute next to its consumer unless a barrier fixes where it starts and ends (the pass
`collective-permute-motion`); with the barriers the schedulers of GPU and TPU start it before the lane and wait for it
after.
"""

import jax
from jax import lax

from jaxpipe.runtime.mesh import PIPE
from jaxpipe.runtime.model import Tree


def hop(values: Tree, devices: int, ring: bool, step: int) -> Tree:
    """Sends to the neighbour.

    Args:
        values: Arrays of this device.
        devices: P. With one device a hop is a handover to itself.
        ring: Whether the last device and the first are neighbours. If not, the ends of the chain receive zeros.
        step: 1 to the right, -1 to the left.

    Returns:
        What the other neighbour sent.
    """
    if devices == 1:
        return values
    pairs = [(d, (d + step) % devices) for d in range(devices)]
    if not ring:
        pairs = [(a, b) for a, b in pairs if b == a + step]
    return jax.tree.map(lambda x: lax.ppermute(x, PIPE, pairs), values)


def fence(arriving: Tree, leaving: Tree) -> tuple[Tree, Tree]:
    """Ends a lane: what was in flight has arrived, and what the lane made may leave."""
    return lax.optimization_barrier((arriving, leaving))
