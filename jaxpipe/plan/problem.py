"""The question: a model, devices, a batch, and what may be chosen; and the answer to it: a plan."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from jaxpipe.errors import ConfigError
from jaxpipe.plan.cost import REMATS, ModelCosts, Remat
from jaxpipe.plan.device import DeviceSpec
from jaxpipe.plan.memory import Memory
from jaxpipe.plan.shape import ModelShape
from jaxpipe.schedule.catalog import CATALOG
from jaxpipe.schedule.stages import format_stages

Head = Literal["last", "vocab_parallel"]
Packing = Literal["auto", "paired", "single"]
Order = Literal["ideal", "strict"]

SCHEDULES = tuple(name for name in CATALOG if name != "inference")


@dataclass(frozen=True)
class Space:
    """What may be chosen; None means any that there is.

    Attributes:
        schedules: Names of the catalogue.
        pipe: Values of P.
        repeats: Values of V.
        tensor: Devices that share products.
        fsdp: Devices that weights rest on.
        data: Copies that share the batch.
        rows: Rows of a microbatch.
        microbatches: Values of M.
        remats: What forwards keep.
        heads: Where the loss is computed.
        counts: Blocks per stage, if they are given.
        split: ``any`` split; ``equal`` counts; or ``even``, the most even counts.
        pinned: Blocks that must be in a given stage, as (block, stage).
        packing: How actions share ticks, see `lower`.
        order: `lower`'s `memory`.
    """

    schedules: Sequence[str] = SCHEDULES
    pipe: Sequence[int] | None = None
    repeats: Sequence[int] | None = None
    tensor: Sequence[int] | None = None
    fsdp: Sequence[int] | None = None
    data: Sequence[int] | None = None
    rows: Sequence[int] | None = None
    microbatches: Sequence[int] | None = None
    remats: Sequence[Remat] = REMATS
    heads: Sequence[Head] = ("last",)
    counts: tuple[int, ...] | None = None
    split: Literal["any", "equal", "even"] = "any"
    pinned: tuple[tuple[int, int], ...] = ()
    packing: Packing | None = None
    order: Order | None = None


@dataclass(frozen=True)
class Problem:
    """What a plan is wanted for.

    Attributes:
        shape: The model.
        device: The devices.
        devices: How many.
        batch: Rows of a step, over all devices.
        costs: ``(rows, tensor) -> ModelCosts``.
        space: What may be chosen.
        memory_bytes: The most that a device may keep; by default what the device has.

    Raises:
        ConfigError: A number below 1.
    """

    shape: ModelShape
    device: DeviceSpec
    devices: int
    batch: int
    costs: Callable[[int, int], ModelCosts]
    space: Space = field(default_factory=Space)
    memory_bytes: float | None = None

    def __post_init__(self):
        for name in ("devices", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1; try 1")

    @property
    def limit_bytes(self) -> float:
        """The most that a device may keep."""
        return self.device.plan_bytes if self.memory_bytes is None else self.memory_bytes


@dataclass(frozen=True)
class Option:
    """One way to run the model, but for the split into stages and the packing.

    Attributes:
        schedule: Name.
        pipe: P.
        repeats: V.
        microbatches: M.
        rows: Of a microbatch on one data shard.
        data: Copies that share the batch.
        fsdp: Copies that share the batch and spread the weights.
        tensor: Devices that share products.
        remat: What forwards keep.
        head: Where the loss is computed.
    """

    schedule: str
    pipe: int
    repeats: int
    microbatches: int
    rows: int
    data: int
    fsdp: int
    tensor: int
    remat: Remat
    head: Head = "last"

    @property
    def stages(self) -> int:
        """P·V."""
        return self.pipe * self.repeats

    @property
    def stride(self) -> int:
        """Devices from one place on the pipe to the next."""
        return self.data * self.fsdp * self.tensor


@dataclass(frozen=True)
class Plan:
    """A way to run the model and what it is predicted to take.

    Attributes:
        option: What was chosen.
        counts: Blocks per stage.
        packing: How actions share ticks.
        order: ``ideal`` or ``strict``, see `lower`'s `memory`.
        step_s: Seconds of a step.
        loop_s: Of it, the loop over the ticks.
        sync_s: Reductions and gathers around the loop.
        optimizer_s: The update.
        bubble: Share of the loop in which devices idle.
        hop_s: One hop.
        mfu: Operations that the model needs, over what the devices' peak allows in a step.
        tokens_per_s: Over all devices.
        memory: Per device.
        ticks: Of the loop.
        source: Where the costs are from.
    """

    option: Option
    counts: tuple[int, ...]
    packing: str
    order: str
    step_s: float
    loop_s: float
    sync_s: float
    optimizer_s: float
    bubble: float
    hop_s: float
    mfu: float
    tokens_per_s: float
    memory: Memory
    ticks: int
    source: str

    @property
    def busy_s(self) -> float:
        """Seconds of a step in which a device does something, on average over devices."""
        return self.step_s - self.loop_s * self.bubble

    @property
    def layout(self) -> str:
        """The split in Megatron-LM's text form."""
        return format_stages(self.counts)

    @property
    def batch(self) -> int:
        """Rows of a step."""
        o = self.option
        return o.rows * o.microbatches * o.data * o.fsdp
