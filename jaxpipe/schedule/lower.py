"""From ticks to the tables that the compiled loop scans over: lanes, routes and buffer slots.

Every value that outlives a lane gets a slot of its kind for exactly the ticks in which it is alive on its device:

    activation   a stage's input            from its arrival (stage 0: its forward) to its backward
    residual     what the backward needs    from the forward to the backward
    gradient     a stage's output gradient  from its arrival (last stage: its forward) to the backward

Slots are given out by interval colouring, so there are exactly as many as values that live at once. A gradient that is
always used in the tick in which it arrives needs no slot at all, and neither has an activation to be read back then
(`TickTable.forward_direct`).

What arrives in a tick was sent by the neighbour's same lane one tick earlier.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Literal

from jaxpipe.errors import ScheduleError
from jaxpipe.schedule.costs import Costs
from jaxpipe.schedule.ir import Action, Schedule
from jaxpipe.schedule.pack import LANE, Packed, lockstep_makespan, pack
from jaxpipe.schedule.rules import Deadlock
from jaxpipe.schedule.verify import verify

Column = tuple[tuple[int, ...], ...]
"""One number per tick and device: ``column[tick][device]``; -1 says that there is none."""

Interval = tuple[int, int, tuple[int, int]]
"""(first tick, last tick, (stage, microbatch)) of a value, both ticks included."""

COLUMNS = (
    "f_repeat",
    "f_microbatch",
    "f_activation",
    "f_residual",
    "f_arrival",
    "h_gradient",
    "b_repeat",
    "b_microbatch",
    "b_activation",
    "b_residual",
    "b_gradient",
    "b_arrival",
)


@dataclass(frozen=True)
class Slots:
    """How many buffers of each kind every device has."""

    activation: int
    residual: int
    gradient: int


@dataclass(frozen=True)
class ModelBytes:
    """What a table needs to know of a model to say its bytes, per device.

    Attributes:
        carry: One microbatch's activations between two blocks.
        residual: What a forward lane stores for its backward, beside the stage's input.
        backward: Working memory of one stage's backward (largest lane).
        ends: Gathered embedding and head parameters.
        ends_gradient: Their gradient accumulators.
        stage_gradient: Gradient accumulators of all V stages.
        casts: Weights kept in the compute dtype during the step.
    """

    carry: int
    residual: int
    backward: int
    ends: int
    ends_gradient: int
    stage_gradient: int
    casts: int = 0


@dataclass(frozen=True)
class Phase:
    """A run of ticks that is compiled as one loop: ticks ``start .. stop-1`` and the lanes that occur in them."""

    start: int
    stop: int
    forward: bool
    head: bool
    backward: bool


@dataclass(frozen=True)
class TickTable:
    """A schedule as plain integer tables of shape [ticks, devices].

    Attributes:
        schedule: The order that runs (with forwards moved ahead if `notes` says so).
        packing: ``single`` or ``paired``.
        ticks: Length of every column.
        columns: By name, see `COLUMNS`. Prefix ``f_`` is the forward lane, ``h_`` the head, ``b_`` the backward lane.
            ``*_repeat`` is -1 where the lane is idle; ``*_arrival`` is the slot into which what arrives in this tick is
            put; the others are slots read or written by the lane. ``h_gradient`` is -1 where no head runs.
        slots: Buffers of each kind.
        forward_direct: Every forward but stage 0's runs in the tick in which its input arrives.
        gradient_direct: Every backward runs in the tick in which its gradient arrives: no gradient slots.
        notes: What a user should know about the choice, one line each.
    """

    schedule: Schedule
    packing: str
    ticks: int
    columns: dict[str, Column] = field(repr=False)
    slots: Slots
    forward_direct: bool
    gradient_direct: bool
    notes: tuple[str, ...] = ()

    @property
    def phases(self) -> tuple[Phase, ...]:
        """At most three: forwards only (fill), both lanes (steady), backwards only (drain)."""
        forwards = [any(r >= 0 for r in row) for row in self.columns["f_repeat"]]
        backwards = [any(r >= 0 for r in row) for row in self.columns["b_repeat"]]
        heads = [any(r >= 0 for r in row) for row in self.columns["h_gradient"]]
        fill = backwards.index(True) if True in backwards else self.ticks
        drain = max(fill, self.ticks - forwards[::-1].index(True))
        bounds = [(a, b) for a, b in ((0, fill), (fill, drain), (drain, self.ticks)) if a < b]
        return tuple(Phase(a, b, any(forwards[a:b]), any(heads[a:b]), any(backwards[a:b])) for a, b in bounds)

    def bytes(self, model: ModelBytes) -> dict[str, int]:
        """Temporary bytes per device, term by term.

        Args:
            model: Sizes of the model's pieces, as `Pipeline.sizes` gives them.

        Returns:
            Bytes by term; their sum is the plan for the program's temporaries. Every kind of buffer has one scratch
            slot, which idle lanes write.
        """
        return {
            "activation slots": (self.slots.activation + 1) * model.carry,
            "residual slots": (self.slots.residual + 1) * model.residual,
            "gradient slots": 0 if self.gradient_direct else (self.slots.gradient + 1) * model.carry,
            "one stage's backward": model.backward,
            "gathered embedding and head": model.ends,
            "their gradients": model.ends_gradient,
            "weight gradients": model.stage_gradient,
            "weights in compute dtype": model.casts,
            "two carries": 2 * model.carry,
        }

    def __str__(self) -> str:
        from jaxpipe.schedule.show import table_text

        return table_text(self)


def lower(
    schedule: Schedule,
    packing: Literal["auto", "paired", "single"] = "auto",
    costs: Costs | None = None,
    memory: Literal["ideal", "strict"] = "ideal",
) -> TickTable:
    """Turns a schedule into tick tables.

    Args:
        schedule: Any schedule; it is verified first.
        packing: ``paired`` lets a forward and a backward share a tick, ``single`` runs one action per tick, ``auto``
            takes the smallest lockstep makespan for the costs given, ties to fewer activations.
        costs: Times of the phases, by default all 1.
        memory: ``ideal`` may move forwards ahead so that hops hide behind the other lane, which keeps more activations
            (`1f1b` then runs as `eager_1f1b`; the table's notes say so). ``strict`` keeps no more than the schedule's own
            order does.

    Returns:
        The tables.

    Raises:
        ScheduleError: The schedule does not verify, holds I or W (not lowered yet), or an option has an unknown value.

    Example:
        >>> from jaxpipe.schedule import build, lower
        >>> table = lower(build("interleaved_1f1b", devices=4, microbatches=8, repeats=2))
        >>> table.ticks, table.slots.activation, table.slots.gradient
        (26, 11, 0)
    """
    if packing not in ("auto", "paired", "single"):
        raise ScheduleError(f"packing={packing!r} must be 'auto', 'paired' or 'single'; try 'auto'")
    if memory not in ("ideal", "strict"):
        raise ScheduleError(f"memory={memory!r} must be 'ideal' or 'strict'; try 'ideal'")
    verify(schedule)
    if schedule.placement != "loop" or not schedule.phases <= {"F", "B"}:
        raise ScheduleError(
            f"schedule={schedule.name!r} with phases {' '.join(sorted(schedule.phases))} and placement "
            f"{schedule.placement} cannot be lowered yet: only F and B on placement loop; try 'interleaved_1f1b'"
        )
    packed = _choose(schedule, packing, costs or Costs(), memory)
    return _tables(packed, _notes(schedule, packed, memory))


def _choose(schedule: Schedule, packing: str, costs: Costs, memory: str) -> Packed:
    candidates = []
    if packing in ("auto", "single"):
        candidates.append(pack(schedule, "single"))
    if packing in ("auto", "paired"):
        candidates.append(pack(schedule, "paired"))
        if memory == "ideal":
            with suppress(Deadlock):  # not every order leaves room for it
                candidates.append(pack(schedule, "paired", advance=True))
    if memory == "strict":
        own = pack(schedule, "single").peak_stages()
        fitting = [p for p in candidates if all(a <= b for a, b in zip(p.peak_stages(), own, strict=True))]
        if not fitting:
            raise ScheduleError(
                f"packing={packing!r} keeps {max(candidates[0].peak_stages())} activations where memory='strict' allows "
                f"{max(own)} for {schedule.name}; try packing='single'"
            )
        candidates = fitting
    return min(candidates, key=lambda p: (round(lockstep_makespan(p, costs), 9), max(p.peak_stages()), p.ticks))


def _notes(schedule: Schedule, packed: Packed, memory: str) -> tuple[str, ...]:
    if not packed.advanced:
        return ()
    own, kept = pack(schedule, "single").peak_stages(), packed.peak_stages()
    if kept == own:
        return ()
    return (
        f"{schedule.name} runs with forwards moved ahead so that hops are hidden: device 0 keeps {kept[0]} stage inputs "
        f"instead of {own[0]}; memory='strict' keeps {own[0]} and exposes every hop",
    )


def _tables(packed: Packed, notes: tuple[str, ...]) -> TickTable:
    schedule = packed.schedule
    columns = {name: [[-1] * schedule.devices for _ in range(packed.ticks)] for name in COLUMNS}
    counts = {"activation": 0, "residual": 0, "gradient": 0}
    lives = [_lifetimes(packed, device) for device in range(schedule.devices)]
    direct = all(start == end for live in lives for start, end, _ in live["gradient"])
    last = schedule.stages - 1
    for device, live in enumerate(lives):
        slot: dict[str, dict[tuple[int, int], int]] = {}
        for kind, intervals in live.items():
            slot[kind], used = colour(intervals)
            counts[kind] = max(counts[kind], used)
        for action in schedule.order[device]:
            value, tick = (action.stage, action.microbatch), packed.tick[action]
            lane = "f" if LANE[action.phase] == 0 else "b"

            def put(name: str, number: int, tick: int = tick, device: int = device):
                columns[name][tick][device] = number

            put(f"{lane}_repeat", schedule.repeat_of(action.stage))
            put(f"{lane}_microbatch", action.microbatch)
            put(f"{lane}_activation", slot["activation"][value])
            put(f"{lane}_residual", slot["residual"].get(value, -1))
            if lane == "b":
                put("b_gradient", slot["gradient"][value])
            elif action.stage == last:
                put("h_gradient", slot["gradient"].get(value, 0))
        for column, kind, source in (("f_arrival", "activation", 0), ("b_arrival", "gradient", last)):
            for start, _, value in live[kind]:
                if value[0] != source:
                    columns[column][start][device] = slot[kind][value]
    if direct:
        counts["gradient"] = 0
    return TickTable(
        schedule=schedule,
        packing=packed.packing,
        ticks=packed.ticks,
        columns={name: tuple(map(tuple, rows)) for name, rows in columns.items()},
        slots=Slots(**counts),
        forward_direct=_forward_direct(packed, lives),
        gradient_direct=direct,
        notes=notes,
    )


def _lifetimes(packed: Packed, device: int) -> dict[str, list[Interval]]:
    """The values that rest on a device, by kind, each with its first and last tick."""
    schedule, tick = packed.schedule, packed.tick
    trains = "B" in schedule.phases
    live: dict[str, list[Interval]] = {"activation": [], "residual": [], "gradient": []}
    for action in schedule.order[device]:
        if action.phase != "F":
            continue
        s, m = action.stage, action.microbatch
        now = tick[action]
        arrival = tick[Action(s - 1, "F", m)] + 1 if s > 0 else now
        end = tick[Action(s, "B", m)] if trains else now
        live["activation"].append((arrival, end, (s, m)))
        if trains:
            live["residual"].append((now, end, (s, m)))
            came = tick[Action(s + 1, "B", m)] + 1 if s < schedule.stages - 1 else now
            live["gradient"].append((came, end, (s, m)))
    return live


def _forward_direct(packed: Packed, lives: Sequence[dict[str, list[Interval]]]) -> bool:
    return all(start == packed.tick[Action(s, "F", m)] for live in lives for start, _, (s, m) in live["activation"])


def colour(intervals: Iterable[Interval]) -> tuple[dict[tuple[int, int], int], int]:
    """Gives each value a slot that no value alive in a common tick has; uses as few slots as possible.

    Args:
        intervals: Values with the first and last tick of their lives.

    Returns:
        The slot of each value, and the number of slots: the most values alive in one tick.

    Example:
        >>> colour([(0, 2, (0, 0)), (1, 3, (0, 1)), (3, 4, (0, 2))])
        ({(0, 0): 0, (0, 1): 1, (0, 2): 0}, 2)
    """
    slot: dict[tuple[int, int], int] = {}
    free: list[int] = []
    busy: list[tuple[int, int]] = []
    used = 0
    for start, end, value in sorted(intervals):
        while busy and busy[0][0] < start:
            heappush(free, heappop(busy)[1])
        if free:
            slot[value] = heappop(free)
        else:
            slot[value], used = used, used + 1
        heappush(busy, (end, slot[value]))
    return slot, used
