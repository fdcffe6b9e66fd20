"""Schedules from a building block: one microbatch's passes, repeated every six units of time.

On the snake placement a device has six passes per microbatch (F, I and W of its two halves). A block says when each F
and I of microbatch 0 runs; microbatch m follows 6m later, so the memory is the block's length over six. What a block
leaves idle at both ends is squeezed out afterwards. All passes are taken as equally long.

Source: Qi et al. 2024, pipeline parallelism with controllable memory, sections 3 and 4 (squeeze and reorder).
"""

from collections.abc import Callable, Mapping, Sequence

from jaxpipe.schedule.families.craft.fill import fill_idle
from jaxpipe.schedule.family import Order
from jaxpipe.schedule.ir import Action, Phase
from jaxpipe.schedule.rules import Value, reads, writes

PERIOD = 6

Times = dict[Action, int]
"""When each action starts, in units of one pass."""

Block = Callable[[int], Mapping[str, int]]
"""``block(device)``: when "F0", "F1", "I1", "I0" of microbatch 0 run there; 0 and 1 are the device's two stages."""


def stable_order(devices: int, microbatches: int, block: Block, cap: int) -> Order:
    """The best of three ways to use up the idle places at both ends of a repeated block.

    Args:
        devices: P.
        microbatches: M.
        block: The building block.
        cap: The most stage activations a device may keep, from F to W.

    Returns:
        The order with the smallest makespan for equal passes.
    """
    stages = 2 * devices
    blocks = _repeat(devices, microbatches, block)
    squeezed = _squeeze([_with_weights(row) for row in blocks], stages)
    moved = _reorder(squeezed, devices, stages, cap, closes="W")
    bare = _squeeze([sorted(row, key=row.__getitem__) for row in blocks], stages)
    bare = _reorder(bare, devices, stages, cap, closes="I")
    filled = fill_idle(_rows(bare, devices), [cap] * devices, stages)
    candidates = [_rows(squeezed, devices), _rows(moved, devices), filled]
    return min(candidates, key=lambda rows: max(_squeeze(rows, stages).values()))


def _repeat(devices: int, microbatches: int, block: Block) -> list[Times]:
    """Per device, the F and I of all microbatches at the block's times."""
    return [
        {
            Action(device if step[1] == "0" else 2 * devices - 1 - device, _phase(step), m): PERIOD * m + start
            for step, start in block(device).items()
            for m in range(microbatches)
        }
        for device in range(devices)
    ]


def _phase(step: str) -> Phase:
    return "F" if step[0] == "F" else "I"


def _with_weights(times: Times) -> list[Action]:
    """One device's order with each W in the first free place after its I."""
    at = {start: action for action, start in times.items()}
    for start, action in sorted(at.items()):
        if action.phase == "I":
            while start in at:
                start += 1
            at[start] = Action(action.stage, "W", action.microbatch)
    return [action for _, action in sorted(at.items())]


def _rows(times: Times, devices: int) -> Order:
    rows: list[list[Action]] = [[] for _ in range(devices)]
    for action in sorted(times, key=times.__getitem__):
        rows[min(action.stage, 2 * devices - 1 - action.stage)].append(action)
    return tuple(map(tuple, rows))


def _squeeze(rows: Sequence[Sequence[Action]], stages: int) -> Times:
    """Each action as soon as its inputs and the order of its device allow."""
    ended: dict[Value, int] = {}
    times: Times = {}
    free, done = [0] * len(rows), [0] * len(rows)
    while any(count < len(row) for count, row in zip(done, rows, strict=True)):
        for d, row in enumerate(rows):
            while done[d] < len(row) and all(value in ended for value in reads(row[done[d]], stages)):
                action = row[done[d]]
                times[action] = max([free[d], *(ended[value] for value in reads(action, stages))])
                free[d] = times[action] + 1
                done[d] += 1
                ended.update(dict.fromkeys(writes(action, stages), free[d]))
    return times


def _reorder(times: Times, devices: int, stages: int, cap: int, closes: Phase) -> Times:
    """Moves passes of the fill and the drain to earlier free places, as dependencies and the cap allow.

    The fill lasts until device 0's first input gradient of its first half, the drain begins after its last forward.
    """
    fill = times[Action(0, "I", 0)]
    drain = max(start for action, start in times.items() if action.stage == 0 and action.phase == "F")
    length = max(times.values()) + 1
    taken = [set[int]() for _ in range(devices)]
    kept = [[0] * (length + 1) for _ in range(devices)]
    for action, start in times.items():
        device = min(action.stage, stages - 1 - action.stage)
        taken[device].add(start)
        if action.phase == "F":
            until = times[Action(action.stage, closes, action.microbatch)]
            for unit in range(start, until + 1):
                kept[device][unit] += 1
    ended = {value: start + 1 for action, start in times.items() for value in writes(action, stages)}
    moved = dict(times)
    for action in sorted(times, key=times.__getitem__):
        start, device = times[action], min(action.stage, stages - 1 - action.stage)
        if fill <= start <= drain:
            continue
        earliest = max((ended[value] for value in reads(action, stages)), default=0)
        for unit in range(earliest, start):
            if unit in taken[device]:
                continue
            if action.phase == "F" and max(kept[device][unit:start]) >= cap:
                continue
            taken[device].remove(start)
            taken[device].add(unit)
            moved[action] = unit
            ended.update(dict.fromkeys(writes(action, stages), unit + 1))
            for between in range(unit, start) if action.phase == "F" else range(unit + 1, start + 1):
                kept[device][between] += 1 if action.phase == "F" else -(action.phase == closes)
            break
    return moved
