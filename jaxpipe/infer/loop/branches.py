"""The stages of all devices as branches of one program: those of one repeat that hold the same kinds in the same places
are one.
"""

from typing import Any

import jax.numpy as jnp

from jaxpipe.runtime.layout.relayout import Layout


def branches_of(layout: Layout) -> list[int]:
    """A stage for each branch."""
    return list(_numbered(layout).values())


def branch_of(layout: Layout, repeat: Any, place: Any) -> Any:
    """Which branch a device takes for a repeat, int32.

    Args:
        layout: Where the blocks are.
        repeat: Of the device's stages, int32.
        place: The device's place on the pipe, int32.
    """
    schedule, keys = layout.schedule, list(_numbered(layout))
    numbers = [
        [keys.index((c, layout.places[schedule.stage_at(d, c)])) for d in range(schedule.devices)]
        for c in range(schedule.repeats)
    ]
    if all(row == [c] * schedule.devices for c, row in enumerate(numbers)):
        return repeat
    return jnp.asarray(numbers, jnp.int32)[repeat, place]


def _numbered(layout: Layout) -> dict[tuple, int]:
    """A stage by repeat and places."""
    schedule = layout.schedule
    stages = [schedule.stage_at(d, c) for c in range(schedule.repeats) for d in range(schedule.devices)]
    return {(schedule.repeat_of(s), layout.places[s]): s for s in stages}
