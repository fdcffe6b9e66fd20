"""Puts weight gradients into the places where a device would otherwise idle, all actions taken as equally long."""

from collections import deque
from collections.abc import Sequence

from jaxpipe.schedule.family import Order
from jaxpipe.schedule.ir import Action
from jaxpipe.schedule.rules import Value, reads, writes


def fill_idle(rows: Sequence[Sequence[Action]], caps: Sequence[int], stages: int) -> Order:
    """Inserts a W for every I, oldest first, without delaying anything else.

    Time goes in units of one action. In each, a device runs its next action if that can start; otherwise the oldest W.
    It also runs the W first where a forward would make it keep more than its cap.

    Args:
        rows: Per device its F and I in order.
        caps: Per device, the most stage activations it may keep, from F to W.
        stages: S.

    Returns:
        The order with W in it.
    """
    ready_at: dict[Value, int] = {}
    done = [0] * len(rows)
    kept = [0] * len(rows)
    waiting: list[deque[Action]] = [deque() for _ in rows]
    result: list[list[Action]] = [[] for _ in rows]
    now = 0
    while any(done[d] < len(row) or waiting[d] for d, row in enumerate(rows)):
        before = [len(row) for row in result]
        for d, row in enumerate(rows):
            action = row[done[d]] if done[d] < len(row) else None
            if action is not None and action.phase == "F" and kept[d] >= caps[d] and waiting[d]:
                action = None
            if action is not None and all(ready_at.get(value, now + 1) <= now for value in reads(action, stages)):
                done[d] += 1
                kept[d] += action.phase == "F"
                if action.phase == "I":
                    waiting[d].append(Action(action.stage, "W", action.microbatch))
            elif waiting[d]:
                action = waiting[d].popleft()
                kept[d] -= 1
            else:
                continue
            result[d].append(action)
            ready_at.update(dict.fromkeys(writes(action, stages), now + 1))
        if before == [len(row) for row in result]:
            raise RuntimeError(f"no device can go on at time {now}: the order without W deadlocks")
        now += 1
    return tuple(map(tuple, result))
