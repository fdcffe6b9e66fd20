"""What processes that train together must decide alike: nothing to ask where there is one process."""

import jax
import numpy as np


def all_agree(yes: bool) -> bool:
    """Whether every process says yes. All must call it, at the same point."""
    if jax.process_count() == 1:
        return yes
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.asarray(yes))))


def first_says(yes: bool) -> bool:
    """What process 0 says, for clocks that differ. All must call it, at the same point."""
    if jax.process_count() == 1:
        return yes
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(yes)))
