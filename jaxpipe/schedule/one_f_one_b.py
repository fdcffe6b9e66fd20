"""1F1B (PipeDream-flush): as few forwards ahead as the pipeline is deep.

Devices 0..2 downwards, M = 4, time to the right:

    F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3
    .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .
    .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .

Bubble time (P-1)(tF+tB), like GPipe; device i keeps min(P-i, M) microbatches' activations. Run under a global tick the
strict order exposes every hop; `lower` therefore packs it in the form of `eager_1f1b` unless asked for
``memory="strict"``.

Source: Narayanan et al. 2021 (SC21), section 2.2.1.
"""

from jaxpipe.schedule.ir import Action


def order(devices: int, microbatches: int, repeats: int) -> tuple[tuple[Action, ...], ...]:
    """Device i: w = min(P-1-i, M) forwards; M-w times one forward, one backward; w backwards."""
    del repeats  # the catalogue lets only 1 through
    return tuple(
        _device_order(device, min(devices - 1 - device, microbatches), microbatches) for device in range(devices)
    )


def _device_order(device: int, warmup: int, microbatches: int) -> tuple[Action, ...]:
    actions = [Action(device, "F", m) for m in range(warmup)]
    for k in range(microbatches - warmup):
        actions += [Action(device, "F", warmup + k), Action(device, "B", k)]
    actions += [Action(device, "B", m) for m in range(microbatches - warmup, microbatches)]
    return tuple(actions)
