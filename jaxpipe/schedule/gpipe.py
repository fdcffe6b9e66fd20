"""GPipe: fill, then drain.

Devices 0..2 downwards, M = 3, time to the right (a B is drawn as long as an F):

    F0 F1 F2 .  .  .  .  B0 B1 B2
    .  F0 F1 F2 .  .  B0 B1 B2 .
    .  .  F0 F1 F2 B0 B1 B2 .  .

Bubble time (P-1)(tF+tB). Device i keeps all M microbatches' activations. Not to be confused with 1F1B, which has the
same bubble and keeps at most P.

Source: Huang et al. 2019, GPipe, section 2.3.
"""

from jaxpipe.schedule.ir import Action


def order(devices: int, microbatches: int, repeats: int) -> tuple[tuple[Action, ...], ...]:
    """All forwards, then all backwards, both in microbatch order."""
    del repeats  # the catalogue lets only 1 through
    return tuple(
        tuple(Action(device, phase, m) for phase in ("F", "B") for m in range(microbatches))
        for device in range(devices)
    )
