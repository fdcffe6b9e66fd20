"""The tick table: a lowered schedule as plain integers, which the compiled loop scans over.

A tick runs on every device its F lane, then its backward lane (B or I), then its W lane; each lane runs at most one
action. What a lane sends arrives before the same lane of the next tick.

    column               what it says, for one tick and device; -1 is "none"
    f_repeat             which of the device's stages the F lane runs; -1: the lane is idle
    f_microbatch         for which microbatch
    f_activation         slot of the stage's input: the F lane reads it there (on stage 0 it puts it there)
    f_residual           slot that the F lane writes; -1 where the stage keeps no residuals (`TickTable.keeps`)
    f_send               where the output goes: `SEND`
    f_arrival            slot for what arrives from the left in this tick, before the lane runs
    f_arrival_right      slot for what arrives from the right (placement v)
    f_arrival_own        slot for what this device's own F lane made in the last tick (a turn of the snake)
    h_gradient           slot for the gradient that the head makes after the F lane; -1: no head runs here
    h_microbatch         the microbatch whose head runs in this tick, on whatever device
    e_microbatch         the microbatch that stage 0's F embeds in this tick, on whatever device
    g_microbatch         the microbatch whose stage-0 B or I (the embedding's gradient) runs, on whatever device
    b_repeat             as above, for the backward lane
    b_microbatch
    b_input_only         1: the lane runs I, 0: it runs B
    b_activation         slots that the lane reads ...
    b_residual
    b_gradient
    b_weight_residual    ... and the slot that I writes for its W
    b_send               where the input's gradient goes
    b_arrival            slot for what arrives from the right
    b_arrival_left       slot for what arrives from the left (placement v)
    b_arrival_own        slot for what this device's own backward lane made in the last tick
    w_repeat             as above, for the W lane
    w_microbatch
    w_activation         slots that the lane reads
    w_residual
    w_weight_residual

In `h_microbatch`, `e_microbatch` and `g_microbatch` all devices have the same number, so that a conditional on it may
hold a collective: a vocab-parallel head or embedding. There is at most one of each per tick, because a stage lives on
one device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from jaxpipe.schedule.forms.grids import table_text
from jaxpipe.schedule.ir import Action, Placement, Schedule

Column = tuple[tuple[int, ...], ...]
"""One number per tick and device: ``column[tick][device]``; -1 says that there is none."""

SEND = {"left": 0, "right": 1, "own": 2}
"""Values of the columns ``*_send``: to a neighbour, or kept for another stage of the same device."""

COLUMNS = (
    "f_repeat",
    "f_microbatch",
    "f_activation",
    "f_residual",
    "f_send",
    "f_arrival",
    "f_arrival_right",
    "f_arrival_own",
    "h_gradient",
    "h_microbatch",
    "e_microbatch",
    "g_microbatch",
    "b_repeat",
    "b_microbatch",
    "b_input_only",
    "b_activation",
    "b_residual",
    "b_gradient",
    "b_weight_residual",
    "b_send",
    "b_arrival",
    "b_arrival_left",
    "b_arrival_own",
    "w_repeat",
    "w_microbatch",
    "w_activation",
    "w_residual",
    "w_weight_residual",
)

ARRIVAL = {
    "f": {"left": "f_arrival", "right": "f_arrival_right", "own": "f_arrival_own"},
    "b": {"left": "b_arrival_left", "right": "b_arrival", "own": "b_arrival_own"},
}
"""By lane, the column that takes in what comes from a side."""


@dataclass(frozen=True)
class Slots:
    """How many buffers of each kind every device has."""

    activation: int
    residual: int
    gradient: int
    weight_residual: int = 0


@dataclass(frozen=True)
class ModelBytes:
    """What a table needs to know of a model to say its bytes, per device.

    Attributes:
        carry: One microbatch's activations between two blocks.
        residual: What a forward lane stores for its backward, beside the stage's input.
        backward: Working memory of the largest lane: a stage's backward or the head.
        ends: Gathered embedding and head parameters.
        ends_gradient: Their gradient accumulators.
        stage_gradient: Gradient accumulators of all V stages.
        casts: Weights kept in the compute dtype during the step.
        weight_residual: What an I stores for its W, beside the stage's input and residual.
        gradient: The gradient of a carry; None: as large as the carry. Integer leaves have none.
    """

    carry: int
    residual: int
    backward: int
    ends: int
    ends_gradient: int
    stage_gradient: int
    casts: int = 0
    weight_residual: int = 0
    gradient: int | None = None


@dataclass(frozen=True)
class Phase:
    """A run of ticks that is compiled as one loop: ticks ``start .. stop-1`` and the lanes that occur in them."""

    start: int
    stop: int
    forward: bool
    head: bool
    backward: bool
    weight: bool = False


@dataclass(frozen=True)
class TickTable:
    """A schedule as plain integer tables of shape [ticks, devices].

    Attributes:
        schedule: The order that runs (with actions moved if `notes` says so).
        packing: ``single`` or ``paired``.
        ticks: Length of every column.
        columns: By name, see `COLUMNS` and the table in this module's docstring.
        slots: Buffers of each kind.
        keeps: Per stage, whether its forward keeps residuals beside its input; where not, the columns `f_residual`,
            `b_residual` and `w_residual` are -1.
        forward_direct: Every forward but stage 0's runs in the tick in which its input arrives.
        gradient_direct: Every backward runs in the tick in which its gradient arrives: no gradient slots.
        notes: What a user should know about the choice, one line each.
    """

    schedule: Schedule
    packing: str
    ticks: int
    columns: dict[str, Column] = field(repr=False)
    slots: Slots
    keeps: tuple[bool, ...]
    forward_direct: bool
    gradient_direct: bool
    notes: tuple[str, ...] = ()

    @property
    def phases(self) -> tuple[Phase, ...]:
        """At most four: forwards only (fill), all lanes (steady), backwards and W (drain), W only."""
        lanes = ("f_repeat", "h_gradient", "b_repeat", "w_repeat")
        forwards, heads, backwards, weights = ([max(row) >= 0 for row in self.columns[name]] for name in lanes)
        fill = _first([b or w for b, w in zip(backwards, weights, strict=True)])
        drain = max(fill, self.ticks - _first(forwards[::-1]))
        tail = max(drain, self.ticks - _first(backwards[::-1]))
        cuts = (0, fill, drain, tail, self.ticks)
        return tuple(
            Phase(a, b, any(forwards[a:b]), any(heads[a:b]), any(backwards[a:b]), any(weights[a:b]))
            for a, b in pairwise(cuts)
            if a < b
        )

    def actions(self, tick: int, device: int) -> tuple[Action, ...]:
        """What a device runs in a tick, in the order of the lanes."""
        found = []
        for lane in "fbw":
            repeat = self.columns[f"{lane}_repeat"][tick][device]
            if repeat >= 0:
                phase = "I" if lane == "b" and self.columns["b_input_only"][tick][device] == 1 else lane.upper()
                microbatch = self.columns[f"{lane}_microbatch"][tick][device]
                stage = self.schedule.stage_at(device, repeat)
                found.append(Action(stage, phase, microbatch))  # pyright: ignore[reportArgumentType]
        return tuple(found)

    def bytes(self, model: ModelBytes, offload: bool = False) -> dict[str, int]:
        """Temporary bytes per device, term by term.

        Args:
            model: Sizes of the model's pieces, as `Pipeline.sizes` gives them.
            offload: Whether activations, residuals and weight-residuals rest in the host's memory: then there is room
                for one that leaves and one that comes back.

        Returns:
            Bytes by term; their sum is the plan for the program's temporaries. Every kind of buffer has one scratch
            slot, which idle lanes write.
        """
        return temporary_bytes(self.slots, self.schedule.placement, model, offload)

    def __str__(self) -> str:
        return table_text(self)


def temporary_bytes(slots: Slots, placement: Placement, model: ModelBytes, offload: bool = False) -> dict[str, int]:
    """What `TickTable.bytes` says, for slots alone; no gradient slots mean that none are needed.

    Args:
        slots: How many buffers there are.
        placement: Of the schedule.
        model: Sizes of the model's pieces.
        offload: As in `TickTable.bytes`.
    """
    gradient = model.carry if model.gradient is None else model.gradient

    def stash(count: int) -> int:
        return min(count + 1, 2) if offload else count + 1

    splits = {}
    if slots.weight_residual:
        splits["weight-residual slots"] = stash(slots.weight_residual) * model.weight_residual
    # [1] In placement v what is under way comes from two sides in the F lane, and from a turn.
    hops = {"two carries": 2} if placement == "loop" else {"four carries": 4}
    return {
        "activation slots": stash(slots.activation) * model.carry,
        "residual slots": stash(slots.residual) * model.residual,
        "gradient slots": (slots.gradient + 1) * gradient if slots.gradient else 0,
        **splits,
        "one lane's working memory": model.backward,
        "gathered embedding and head": model.ends,
        "their gradients": model.ends_gradient,
        "weight gradients": model.stage_gradient,
        "weights in compute dtype": model.casts,
        **{name: count * model.carry for name, count in hops.items()},
    }


def _first(flags: Sequence[bool]) -> int:
    """Place of the first True; the length if there is none."""
    return flags.index(True) if True in flags else len(flags)
