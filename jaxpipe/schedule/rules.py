"""THE dependency rule, written once: what an action reads and what it writes.

Everything that must respect dependencies (`verify`, `simulate`, `lower`) asks these two functions and `run_order`.
A value is named by its kind and by the stage and microbatch that *use* it:

    x(s, m)   the input of stage s           written by F of stage s-1, read by F of stage s
    r(s, m)   the residuals of stage s       written by F, read by B or I of the same stage
    g(s, m)   the gradient arriving at s     written by B or I of stage s+1, read by B or I of stage s
    w(s, m)   what W needs                   written by I, read by W of the same stage

Stage 0 reads its x from the batch and the last stage makes its g from the loss: neither is written by an action.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from jaxpipe.schedule.ir import Action, Schedule

Kind = Literal["x", "r", "g", "w"]


class Value(NamedTuple):
    """Something that one action writes and another reads."""

    kind: Kind
    stage: int
    microbatch: int


def reads(action: Action, stages: int) -> tuple[Value, ...]:
    """The values an action needs, of a pipeline with so many stages."""
    s, m = action.stage, action.microbatch
    match action.phase:
        case "F":
            return (Value("x", s, m),) if s > 0 else ()
        case "W":
            return (Value("w", s, m),)
        case _:
            return (Value("r", s, m),) + ((Value("g", s, m),) if s < stages - 1 else ())


def writes(action: Action, stages: int) -> tuple[Value, ...]:
    """The values an action makes, of a pipeline with so many stages."""
    s, m = action.stage, action.microbatch
    match action.phase:
        case "F":
            return (Value("r", s, m),) + ((Value("x", s + 1, m),) if s < stages - 1 else ())
        case "B":
            return (Value("g", s - 1, m),) if s > 0 else ()
        case "I":
            return (Value("w", s, m),) + ((Value("g", s - 1, m),) if s > 0 else ())
        case _:
            return ()


class Deadlock(Exception):
    """No device can go on. Carries, per device, how many of its actions have run."""

    def __init__(self, done: list[int]):
        super().__init__(done)
        self.done = done


def run_order(schedule: Schedule) -> Iterator[tuple[int, Action]]:
    """Yields (device, action) in an order in which every value is written before it is read.

    Raises:
        Deadlock: Every device waits for a value that no device can write any more.
    """
    written: set[Value] = set()
    done = [0] * schedule.devices
    left = sum(len(actions) for actions in schedule.order)
    while left:
        before = left
        for device, actions in enumerate(schedule.order):
            while done[device] < len(actions):
                action = actions[done[device]]
                if not written.issuperset(reads(action, schedule.stages)):
                    break
                written.update(writes(action, schedule.stages))
                done[device] += 1
                left -= 1
                yield device, action
        if left == before:
            raise Deadlock(done)
