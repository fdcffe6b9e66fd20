"""A tick table run on paper: does every lane find what it needs?

The machine knows what the columns mean (see `jaxpipe.schedule.lowering.table`) and nothing of how they were filled.
Values are names, ``x``, ``r``, ``g`` and ``w`` of the dependency rule; per tick they move over hops and through slots
exactly as the columns say.
"""

from collections import Counter

from jaxpipe.errors import ScheduleError
from jaxpipe.schedule.ir import Action
from jaxpipe.schedule.lowering.table import ARRIVAL, COLUMNS, SEND, TickTable
from jaxpipe.schedule.rules import Value

SIDES = ("left", "right", "own")


def check(table: TickTable) -> TickTable:
    """Replays a table and returns it.

    Checks that each lane reads the values that its action needs, that whatever is read was written and not overwritten,
    that what arrives is not lost while it is needed, that slots are within their counts, that `forward_direct` and
    `gradient_direct` hold, that the columns which are equal on all devices tell what the lanes of the two ends run, and
    that every action of the schedule runs exactly once.

    Raises:
        ScheduleError: Names the tick, the device and the rule.

    Example:
        >>> from jaxpipe.schedule import build, lower
        >>> check(lower(build("1f1b", devices=2, microbatches=3))).ticks
        5
    """
    shapes = {name: {len(row) for row in rows} | {-len(rows)} for name, rows in table.columns.items()}
    for name in COLUMNS:
        if shapes.get(name) != {table.schedule.devices, -table.ticks}:
            raise ScheduleError(f"column {name} must have shape [{table.ticks}, {table.schedule.devices}]")
    if len(table.keeps) != table.schedule.stages:
        raise ScheduleError(
            f"keeps has {len(table.keeps)} flags but must have one per stage; try {table.schedule.stages}"
        )
    machine = _Machine(table)
    for tick in range(table.ticks):
        machine.run(tick)
    expected = Counter(a for row in table.schedule.order for a in row)
    if machine.ran != expected:
        wrong = next(iter((machine.ran - expected) + (expected - machine.ran)))
        raise ScheduleError(f"{wrong} runs {machine.ran[wrong]} times but must run {expected[wrong]} times")
    return table


class _Machine:
    """Slots and hops of all devices, holding names of values."""

    def __init__(self, table: TickTable):
        devices = range(table.schedule.devices)
        self.table, self.schedule = table, table.schedule
        slots = table.slots
        gradients = slots.gradient
        if table.gradient_direct:  # [1] No buffer: the columns then only say that something arrives.
            gradients = 1 + max(n for name in _GRADIENTS for row in table.columns[name] for n in row)
        counts = {
            "activation": slots.activation,
            "residual": slots.residual,
            "gradient": gradients,
            "weight_residual": slots.weight_residual,
        }
        self.slots: dict[str, list[list[Value | None]]] = {
            kind: [[None] * count for _ in devices] for kind, count in counts.items()
        }
        # hops[lane][side][d]: what is on its way to device d from that side
        self.hops: dict[str, dict[str, list[Value | None]]] = {lane: {} for lane in "fb"}
        for lane in "fb":
            self._clear(lane)
        # what a device took in, or made in its head, in this tick
        self.arrived: set[tuple[int, Value]] = set()
        self.ran: Counter[Action] = Counter()

    def run(self, tick: int) -> None:
        """One tick of all devices, lane by lane."""
        self.tick = tick
        # [1] Hops sent in the last tick are taken in before the lane runs; what it sends now is for the next tick.
        self.arrived = set()
        for lane, runs in (("f", self._forward), ("b", self._backward)):
            for device in range(self.schedule.devices):
                for side in SIDES:
                    self._take_in(lane, side, device)
            self._clear(lane)
            for device in range(self.schedule.devices):
                runs(device)
        for device in range(self.schedule.devices):
            self._weight(device)
        self._ends()

    def _ends(self) -> None:
        """What stage 0 and the last stage run in this tick is known to all devices."""
        ran = [action for device in range(self.schedule.devices) for action in self.table.actions(self.tick, device)]
        last = self.schedule.stages - 1
        for name, stage, phases in (("h", last, "F"), ("e", 0, "F"), ("g", 0, "BI")):
            found = [a.microbatch for a in ran if a.stage == stage and a.phase in phases] or [-1]
            for device in range(self.schedule.devices):
                if self._at(f"{name}_microbatch", device) != found[0]:
                    self._fail(device, f"{name}_microbatch must be {found[0]}, as stage {stage} runs")

    def _clear(self, lane: str) -> None:
        self.hops[lane] = {side: [None] * self.schedule.devices for side in SIDES}

    def _take_in(self, lane: str, side: str, device: int) -> None:
        value, slot = self.hops[lane][side][device], self._at(ARRIVAL[lane][side], device)
        if value is None and slot >= 0:
            self._fail(device, f"nothing comes from {side} for {ARRIVAL[lane][side]}")
        if value is not None and slot < 0:
            self._fail(device, f"{value} comes from {side} and has no slot")
        if value is not None:
            self._write("activation" if lane == "f" else "gradient", slot, device, value)
            self.arrived.add((device, value))

    def _forward(self, device: int) -> None:
        action = self._action("f", "F", device)
        if action is None:
            if self._at("h_gradient", device) >= 0:
                self._fail(device, "a head runs without a forward")
            return
        s, m = action.stage, action.microbatch
        x = Value("x", s, m)
        if s == 0:
            self._write("activation", self._at("f_activation", device), device, x)
        else:
            self._read("f", "activation", device, x)
            if self.table.forward_direct and (device, x) not in self.arrived:
                self._fail(device, f"forward_direct, but {x} did not arrive in this tick")
        head = self._at("h_gradient", device)
        if (head >= 0) != (s == self.schedule.stages - 1):
            self._fail(device, "the head must run with the last stage's forward and only then")
        trains = self.schedule.phases != {"F"}
        if trains and self._keeps("f", device, s):
            self._write("residual", self._at("f_residual", device), device, Value("r", s, m))
        if head < 0:
            self._send("f", device, Value("x", s + 1, m))
        elif trains:
            self._write("gradient", head, device, Value("g", s, m))
            self.arrived.add((device, Value("g", s, m)))

    def _backward(self, device: int) -> None:
        split = self._at("b_input_only", device)
        action = self._action("b", "I" if split == 1 else "B", device)
        if (action is None) != (split < 0):
            self._fail(device, "b_input_only must be 0 or 1 where the lane runs, else -1")
        if action is None:
            return
        s, m = action.stage, action.microbatch
        gradient = Value("g", s, m)
        self._read("b", "activation", device, Value("x", s, m))
        if self._keeps("b", device, s):
            self._read("b", "residual", device, Value("r", s, m))
        self._read("b", "gradient", device, gradient)
        if self.table.gradient_direct and (device, gradient) not in self.arrived:
            self._fail(device, f"gradient_direct, but {gradient} did not arrive in this tick")
        if split:
            self._write("weight_residual", self._at("b_weight_residual", device), device, Value("w", s, m))
        if s > 0:
            self._send("b", device, Value("g", s - 1, m))
        elif self._at("b_send", device) >= 0:
            self._fail(device, "stage 0 has no gradient to send")

    def _weight(self, device: int) -> None:
        action = self._action("w", "W", device)
        if action is not None:
            s, m = action.stage, action.microbatch
            self._read("w", "activation", device, Value("x", s, m))
            if self._keeps("w", device, s):
                self._read("w", "residual", device, Value("r", s, m))
            self._read("w", "weight_residual", device, Value("w", s, m))

    def _action(self, lane: str, phase: str, device: int) -> Action | None:
        repeat, microbatch = self._at(f"{lane}_repeat", device), self._at(f"{lane}_microbatch", device)
        if repeat < 0:
            for name in COLUMNS:
                if name.startswith(f"{lane}_") and "arrival" not in name and self._at(name, device) >= 0:
                    self._fail(device, f"{name} is set though the lane is idle")
            return None
        action = Action(self.schedule.stage_at(device, repeat), phase, microbatch)  # pyright: ignore[reportArgumentType]
        self.ran[action] += 1
        return action

    def _keeps(self, lane: str, device: int, stage: int) -> bool:
        """Whether a stage has residuals; one that has none must name no slot."""
        if not self.table.keeps[stage] and self._at(f"{lane}_residual", device) >= 0:
            self._fail(device, f"{lane}_residual is set though stage {stage} keeps no residuals")
        return self.table.keeps[stage]

    def _send(self, lane: str, device: int, value: Value) -> None:
        way = self._at(f"{lane}_send", device)
        if way == SEND["own"]:
            self.hops[lane]["own"][device] = value
            return
        if way < 0:
            self._fail(device, f"{value} is not sent")
        to, side = (device + 1, "left") if way == SEND["right"] else (device - 1, "right")
        wraps = self.schedule.placement == "loop" and self.schedule.repeats > 1
        if wraps:
            to %= self.schedule.devices
        if not 0 <= to < self.schedule.devices:
            self._fail(device, f"{value} is sent off the end of the chain")
        self.hops[lane][side][to] = value

    def _write(self, kind: str, slot: int, device: int, value: Value) -> None:
        if not 0 <= slot < len(self.slots[kind][device]):
            self._fail(device, f"{value} is written to {kind} slot {slot} of {len(self.slots[kind][device])}")
        self.slots[kind][device][slot] = value

    def _read(self, lane: str, kind: str, device: int, value: Value) -> None:
        slot = self._at(f"{lane}_{kind}", device)
        if not 0 <= slot < len(self.slots[kind][device]) or self.slots[kind][device][slot] != value:
            held = self.slots[kind][device][slot] if 0 <= slot < len(self.slots[kind][device]) else "not there"
            self._fail(device, f"{lane.upper()} lane needs {value} but {kind} slot {slot} is {held}")

    def _at(self, column: str, device: int) -> int:
        return self.table.columns[column][self.tick][device]

    def _fail(self, device: int, rule: str) -> None:
        raise ScheduleError(f"tick {self.tick}, device {device}: {rule}")


_GRADIENTS = ("b_gradient", "b_arrival", "b_arrival_left", "b_arrival_own", "h_gradient")
