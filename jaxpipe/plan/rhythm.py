"""A packed schedule as a few kinds of tick and how often each occurs, so that it is priced for many costs at once.

The steady phase repeats itself, so there are far fewer kinds of tick than ticks, and a schedule for many microbatches
is one for fewer with more of the same: from 4P microbatches on, P more add the same ticks and slots every time.
`rhythms` therefore builds schedules for at most 4P microbatches and adds the rest, where P divides their number.

`Rhythm.makespan` is the model of `jaxpipe.schedule.lowering.lockstep.lockstep_makespan`, which tests hold it to, and
two things more that are true of devices simulated on a CPU: hops that nothing hides, and cores that devices share, so
that one which waits leaves its core to the others.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import ceil
from typing import NamedTuple

from jaxpipe.plan.problem import Order, Packing
from jaxpipe.schedule import Costs, Schedule, build
from jaxpipe.schedule.lowering.lockstep import lanes_that_send
from jaxpipe.schedule.lowering.pack import Packed, packings
from jaxpipe.schedule.lowering.slots import KINDS, action_ticks, lifetimes
from jaxpipe.schedule.lowering.table import Slots


class Beat(NamedTuple):
    """One kind of tick.

    Attributes:
        forward: The stage of every device's F, -1 for none.
        backward: The stage of every device's B or I.
        input_only: Whether it is an I.
        weight: The stage of every device's W.
        before: Whether the backward lanes of the tick before sent to another device.
        sends: Whether the forward lanes of this tick do.
        head: Whether all devices run a head after their forwards.
    """

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    input_only: tuple[bool, ...]
    weight: tuple[int, ...]
    before: bool
    sends: bool
    head: bool


@dataclass(frozen=True)
class Rhythm:
    """A way to pack a schedule.

    Attributes:
        packing: ``paired`` or ``single``.
        moved: Whether actions left the schedule's own order.
        placement: Of the schedule.
        beats: Kinds of tick with how often they occur.
        ticks: Of the whole loop.
        peak: The most stage inputs that a device keeps.
        count_slots: What `slots` is found by, once it is asked for.
    """

    packing: str
    moved: bool
    placement: str
    beats: tuple[tuple[Beat, float], ...] = field(repr=False)
    ticks: int
    peak: int
    count_slots: Callable[[], Slots] = field(repr=False, compare=False)

    @cached_property
    def slots(self) -> Slots:
        """Buffers of each kind, residuals counted as if all stages kept some."""
        return self.count_slots()

    def makespan(self, prices: "Prices", hop: float = 0.0, head: float = 0.0, cores: "Cores | None" = None) -> float:
        """Time of the loop when every tick waits for its slowest device.

        Args:
            prices: Times of the actions.
            hop: Time of a transfer.
            head: Time of a head that all devices run.
            cores: What all devices share, where nothing hides a hop; None where each computes alone.
        """
        return sum(count * _time(beat, prices, hop, head, cores) for beat, count in self._classes(prices.classes))

    def _classes(self, classes: tuple[int, ...]) -> "list[tuple[_Tick, float]]":
        """The kinds of tick that are left when stages of one class are alike."""
        if classes not in self._by_classes:
            found: defaultdict[_Tick, float] = defaultdict(float)
            for beat, count in self.beats:
                rows = zip(beat.forward, beat.backward, beat.input_only, beat.weight, strict=True)
                lanes = Counter((classes[f], classes[b], only, classes[w]) for f, b, only, w in rows)
                found[_Tick(frozenset(lanes.items()), beat.before, beat.sends, beat.head)] += count
            self._by_classes[classes] = list(found.items())
        return self._by_classes[classes]

    @cached_property
    def _by_classes(self) -> "dict[tuple[int, ...], list[tuple[_Tick, float]]]":
        return {}


class _Tick(NamedTuple):
    """A kind of tick of classes of stages: how many devices run which lanes, and the flags of `Beat`."""

    lanes: frozenset[tuple[tuple[int, int, bool, int], int]]
    before: bool
    sends: bool
    head: bool


@dataclass(frozen=True)
class Cores:
    """The cores of a machine whose devices are simulated.

    Attributes:
        number: Of them.
        alone: How many times as fast a lane is while no other device computes: it has all cores, and their memory.
    """

    number: float
    alone: float = 1.0

    def time(self, lanes: Sequence[tuple[float, int]]) -> float:
        """Seconds until all of some lanes have ended that start together and get equal shares.

        Args:
            lanes: Seconds of a lane, and how many devices run such a one.
        """
        time = done = 0.0
        running = sum(number for _, number in lanes)
        for seconds, number in sorted(lanes):
            time += (seconds - done) * running / self._speed(running) if seconds > done else 0.0
            done = max(done, seconds)
            running -= number
        return time

    def _speed(self, running: int) -> float:
        """What all lanes that run get done together, in lanes beside others."""
        if running >= self.number or self.number <= 1:
            return self.number
        gained = min(self.alone, self.number) - 1
        return running + gained * (self.number - running) / (self.number - 1)


@dataclass(frozen=True)
class Prices:
    """Times of the actions, by stage; the last entry is 0, for lanes that do nothing."""

    forward: Sequence[float]
    backward: Sequence[float]
    input: Sequence[float]
    weight: Sequence[float]

    @classmethod
    def of(cls, costs: Costs, schedule: Schedule) -> "Prices":
        """The prices of `Costs`."""
        price = costs.prices(schedule)
        columns = ([price.get((s, p), 0.0) for s in range(schedule.stages)] + [0.0] for p in "FBIW")
        return cls(*columns)

    @cached_property
    def classes(self) -> tuple[int, ...]:
        """For every stage the first one that costs the same."""
        rows = list(zip(self.forward, self.backward, self.input, self.weight, strict=True))
        first: dict[tuple, int] = {}
        return tuple(first.setdefault(row, stage) for stage, row in enumerate(rows))


def _time(tick: _Tick, prices: Prices, hop: float, head: float, cores: Cores | None) -> float:
    forward, backward, inputs, weight = prices.forward, prices.backward, prices.input, prices.weight
    lanes = [
        (forward[f], (inputs if only else backward)[b] + weight[w], number) for (f, b, only, w), number in tick.lanes
    ]
    head = head if tick.head else 0.0
    if cores is not None:
        devices = sum(number for _, _, number in lanes)
        heads = head * max(1.0, devices / cores.number)
        return cores.time([(f + b, number) for f, b, number in lanes]) + heads + hop * (tick.before or tick.sends)
    floor_f, floor_b = hop * tick.before, hop * tick.sends
    if head:
        return max(max(f for f, _, _ in lanes), floor_f) + head + max(max(b for _, b, _ in lanes), floor_b)
    return max(max(f, floor_f) + max(b, floor_b) for f, b, _ in lanes)


@lru_cache(maxsize=256)
def rhythms(name: str, devices: int, microbatches: int, repeats: int) -> tuple[Rhythm, ...]:
    """Every way of packing a schedule of the catalogue that `lower` may choose.

    Args:
        name: Of the catalogue.
        devices: P.
        microbatches: M.
        repeats: V.
    """
    least = 4 * devices
    if microbatches <= least or microbatches % devices:
        return _built(name, devices, microbatches, repeats)
    fewer = _built(name, devices, least - devices, repeats)
    more = _built(name, devices, least, repeats)
    if len(fewer) != len(more):  # some way of packing exists for the one number only
        return _built(name, devices, microbatches, repeats)
    times = (microbatches - least) / devices
    return tuple(_longer(a, b, times) for a, b in zip(fewer, more, strict=True))


@lru_cache(maxsize=128)
def _built(name: str, devices: int, microbatches: int, repeats: int) -> tuple[Rhythm, ...]:
    schedule = build(name, devices=devices, microbatches=microbatches, repeats=repeats)
    return tuple(rhythm(packed, schedule) for packed in packings(schedule, "auto"))


def rhythm(packed: Packed, schedule: Schedule) -> Rhythm:
    """The rhythm of packed actions, and whether they are in the order of the schedule."""
    return Rhythm(
        packing=packed.packing,
        moved=packed.sharing == "weights_held" or packed.schedule is not schedule,
        placement=packed.schedule.placement,
        beats=tuple(_beats(packed).items()),
        ticks=packed.ticks,
        peak=max(packed.peak_stages()),
        count_slots=lambda: _slots(packed),
    )


def _beats(packed: Packed) -> dict[Beat, float]:
    schedule, last = packed.schedule, packed.schedule.stages - 1
    idle, off = [-1] * packed.ticks, [False] * packed.ticks
    columns: list[list[list]] = [[list(idle) for _ in schedule.order] for _ in range(3)]
    only = [list(off) for _ in schedule.order]
    heads = list(off)
    for device, (actions, ticks) in enumerate(packed.timed):
        forward, backward, weight = (column[device] for column in columns)
        inputs = only[device]
        for action, tick in zip(actions, ticks, strict=True):
            stage, phase = action.stage, action.phase
            if phase == "F":
                forward[tick] = stage
                heads[tick] |= stage == last
            elif phase == "W":
                weight[tick] = stage
            else:
                backward[tick] = stage
                inputs[tick] = phase == "I"
    sends = lanes_that_send(packed)
    before = [False, *(b for _, b in sends)]
    rows = zip(*(zip(*c, strict=True) for c in (columns[0], columns[1], only, columns[2])), strict=True)
    flags = zip(before, (f for f, _ in sends), heads, strict=False)
    found = Counter(zip(rows, flags, strict=True))
    return {Beat._make((*row, *flag)): count for (row, flag), count in found.items()}


def _slots(packed: Packed) -> Slots:
    """What `lower` would allot, without the numbers of the slots."""
    ticks = action_ticks(packed)
    most: dict[str, int] = dict.fromkeys(KINDS, 0)
    direct = True
    for device in range(packed.schedule.devices):
        for kind, intervals in lifetimes(packed, ticks, device).items():
            change = [0] * (packed.ticks + 2)
            for start, end, _ in intervals:
                change[start] += 1
                change[end + 1] -= 1
            alive = 0
            for delta in change:
                alive += delta
                most[kind] = max(most[kind], alive)
            direct &= kind != "gradient" or all(start == end for start, end, _ in intervals)
    return Slots(**{**most, "gradient": 0 if direct else most["gradient"]})


def _longer(fewer: Rhythm, more: Rhythm, times: float) -> Rhythm:
    """`more`, and `times` what it has more than `fewer`."""
    counts = dict(more.beats)
    for beat, count in more.beats:
        counts[beat] += times * count
    for beat, count in fewer.beats:
        counts[beat] = counts.get(beat, 0.0) - times * count

    def slots() -> Slots:
        kinds = vars(more.slots)
        rise = {kind: max(0, kinds[kind] - vars(fewer.slots)[kind]) for kind in kinds}
        return Slots(**{kind: kinds[kind] + ceil(times * rise[kind]) for kind in kinds})

    return Rhythm(
        packing=more.packing,
        moved=more.moved,
        placement=more.placement,
        beats=tuple((beat, count) for beat, count in counts.items() if count),
        ticks=more.ticks + round(times * (more.ticks - fewer.ticks)),
        peak=more.peak + ceil(times * max(0, more.peak - fewer.peak)),
        count_slots=slots,
    )


def choose(found: Sequence[Rhythm], prices: Prices, packing: Packing, order: Order) -> Rhythm:
    """The one that `lower` takes for these prices: cheapest, then fewest activations, then fewest ticks.

    Args:
        found: All ways of packing.
        prices: Times of the actions.
        packing: As in `lower`.
        order: `lower`'s `memory`.
    """
    allowed = [r for r in found if packing in ("auto", r.packing) and not (r.moved and order == "strict")]
    priced = [(round(r.makespan(prices), 9), r) for r in allowed]
    least = min(makespan for makespan, _ in priced)
    return min((r for makespan, r in priced if makespan == least), key=lambda r: (r.peak, r.ticks))
