"""Hops between neighbours, and the barriers that keep them in flight while a lane computes.

One `ppermute` per direction that a phase uses: an open chain, or a ring when activations wrap around. XLA
places a permute next to its consumer unless a barrier fixes where it starts and ends (the pass
`collective-permute-motion`); with the barriers the schedulers of GPU and TPU start it before the lane and wait for it
after.

On GPUs XLA keeps one collective in flight at a time, so that of the two hops that a lane starts on the placement ``v``
one waits for the other and hides behind little, and every hop for what crosses `tensor` in a lane. A hop may be put on
a stream of its own; XLA then keeps one of each in flight.
"""

from contextlib import nullcontext

import jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from jaxpipe.runtime.layout.mesh import PIPE
from jaxpipe.runtime.model import Tree


def hop(values: Tree, devices: int, ring: bool, step: int, own_stream: bool = False) -> Tree:
    """Sends to the neighbour.

    Args:
        values: Arrays of this device.
        devices: P. With one device a hop is a handover to itself.
        ring: Whether the last device and the first are neighbours. If not, the ends of the chain receive zeros.
        step: 1 to the right, -1 to the left.
        own_stream: On GPUs, on the stream that XLA sets apart for point-to-point transfers. A hint: other backends
            ignore it.

    Returns:
        What the other neighbour sent.
    """
    if devices == 1:
        return values
    pairs = [(d, (d + step) % devices) for d in range(devices)]
    if not ring:
        pairs = [(a, b) for a, b in pairs if b == a + step]
    with set_xla_metadata(_xla_gpu_collective_stream="p2p") if own_stream else nullcontext():
        return jax.tree.map(lambda x: lax.ppermute(x, PIPE, pairs), values)


def fence(arriving: Tree, leaving: Tree) -> tuple[Tree, Tree]:
    """Ends a lane: what was in flight has arrived, and what the lane made may leave."""
    return lax.optimization_barrier((arriving, leaving))
