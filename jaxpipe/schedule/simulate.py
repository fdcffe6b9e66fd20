"""How long a schedule takes and what it keeps, for given costs and a given runtime. No device is needed.

Three runtimes:

    async            every device runs its own program: an action starts when its inputs have arrived and its device is
                     free. The lower limit, and what the published formulas describe.
    lockstep         the compiled loop with a global wait: a tick lasts as long as its slowest device's.
    lockstep_local   the compiled loop with each lane waiting on its own: F for the F lanes of the last tick, B, I and W
                     for the backward lanes. A device may run ahead in one lane while it waits in the other.

The lockstep runtimes run what `lower` makes of the schedule for the same costs. It may move actions to hide hops;
memory is then that of the moved order.

A vocab-parallel head (`Costs.head`) is run by all devices together, once per microbatch:

    lockstep, lockstep_local   in the ticks of the last stage's forwards all devices meet after their F lane, then spend
                               the head, then go on. It counts as work of every device (`Timing.heads`).
    async                      it is charged to the last stage's forward: nobody else waits for it but for its result. A
                               lower limit, as everything under this runtime.
"""

from typing import Literal

from jaxpipe.errors import ScheduleError
from jaxpipe.schedule.costs import Costs, check_costs
from jaxpipe.schedule.ir import Action, Schedule, check_schedule
from jaxpipe.schedule.lowering.lockstep import run_lanes
from jaxpipe.schedule.lowering.lower import choose
from jaxpipe.schedule.lowering.pack import Packing
from jaxpipe.schedule.lowering.timing import Heads, Interval, Timing, timing_of
from jaxpipe.schedule.rules import Value, reads, writes

Runtime = Literal["async", "lockstep", "lockstep_local"]


def simulate(
    schedule: Schedule,
    costs: Costs | None = None,
    runtime: Runtime = "async",
    *,
    packing: Literal["auto"] | Packing = "auto",
    memory: Literal["ideal", "strict"] = "ideal",
    blocking_hops: bool = False,
    after_input: float = 1.0,
) -> Timing:
    """Runs a schedule on paper.

    Args:
        schedule: A verified schedule.
        costs: Times of the phases, by default 1 each; in any unit, which is the unit of the result.
        runtime: ``async``, ``lockstep`` or ``lockstep_local``, see above.
        packing: How the lockstep runtimes share ticks, as in `lower`.
        memory: Whether the lockstep runtimes may move actions and keep more, as in `lower`.
        blocking_hops: Under ``async``, a hop occupies its sender (it is idle then, but may not go on).
        after_input: Share of a microbatch's activations that is kept from I to its W.

    Returns:
        Times, bubbles, memory and the critical path.

    Raises:
        ScheduleError: An option has an unknown value.

    Example:
        >>> from jaxpipe.schedule import build
        >>> timing = simulate(build("1f1b", devices=4, microbatches=8))
        >>> timing.makespan, round(timing.bubble, 3), timing.peak_activations
        (33.0, 0.273, (4.0, 3.0, 2.0, 1.0))
    """
    check_schedule(schedule)
    check_costs(costs)
    costs = costs or Costs()
    if runtime not in ("async", "lockstep", "lockstep_local"):
        raise ScheduleError(f"runtime={runtime!r} must be 'async', 'lockstep' or 'lockstep_local'; try 'async'")
    if packing not in ("auto", "paired", "single"):
        raise ScheduleError(f"packing={packing!r} must be 'auto', 'paired' or 'single'; try 'auto'")
    if memory not in ("ideal", "strict"):
        raise ScheduleError(f"memory={memory!r} must be 'ideal' or 'strict'; try 'ideal'")
    if not 0 <= after_input <= 1:
        raise ScheduleError(f"after_input={after_input} must be between 0 and 1; try 1")
    if runtime == "async":
        return timing_of(schedule, *_asynchronous(schedule, costs, blocking_hops), after_input)
    packed = choose(schedule, packing, costs, memory)
    return timing_of(packed.schedule, *run_lanes(packed, costs, runtime == "lockstep_local"), after_input)


def _asynchronous(
    schedule: Schedule, costs: Costs, blocking: bool
) -> tuple[list[list[Interval]], dict[Action, Action], Heads]:
    """Each action as early as its inputs and its device allow, and which action each one waited for."""
    price, stages = costs.prices(schedule), schedule.stages
    price[stages - 1, "F"] += costs.head
    owner = [schedule.device_of(stage) for stage in range(stages)]
    arrives: dict[Value, tuple[float, Action]] = {}
    free = [0.0] * schedule.devices
    busy: list[list[Interval]] = [[] for _ in schedule.order]
    waited_for: dict[Action, Action] = {}
    left = sum(map(len, schedule.order))
    while left:
        before = left
        for device, (actions, row) in enumerate(zip(schedule.order, busy, strict=True)):
            while len(row) < len(actions):
                action = actions[len(row)]
                inputs = [arrives.get(value) for value in reads(action, stages)]
                if None in inputs:
                    break
                start, cause = free[device], row[-1].action if row else None
                for when, maker in filter(None, inputs):
                    if when > start:
                        start, cause = when, maker
                if cause is not None:
                    waited_for[action] = cause
                end = free[device] = start + price[action.stage, action.phase]
                row.append(Interval(start, end, action))
                for value in writes(action, stages):
                    leaves = owner[value.stage] != device
                    arrives[value] = (end + costs.hop * leaves, action)
                    if leaves and blocking:
                        free[device] = end + costs.hop
                left -= 1
        if left == before:
            raise ScheduleError("the devices wait for each other in a circle; `verify` shows where")
    return busy, waited_for, ()
