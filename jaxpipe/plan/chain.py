"""A chain of blocks that is to be cut into stages, with all that restricts the cuts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxpipe.errors import PartitionError
from jaxpipe.schedule.ir import Placement


@dataclass(frozen=True)
class Chain:
    """What is to be cut.

    Attributes:
        costs: Of each block.
        stages: P·V.
        first: Cost of the first stage beside its blocks.
        last: Cost of the last stage beside its blocks.
        bytes: Memory that each block takes, in any unit; needed with `stage_bytes` and `device_bytes`.
        stage_bytes: The most memory that the blocks of one stage may take.
        device_bytes: The most memory that the blocks of one device may take, one number per device.
        placement: Which stages share a device, with `device_bytes`.
        pinned: Blocks that must be in a given stage.

    Raises:
        PartitionError: Lengths or pins that contradict each other.
    """

    costs: Sequence[float]
    stages: int
    first: float = 0.0
    last: float = 0.0
    bytes: Sequence[float] | None = None
    stage_bytes: float | None = None
    device_bytes: Sequence[float] | None = None
    placement: Placement = "loop"
    pinned: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self):
        if self.stages < 1:
            raise PartitionError(f"stages={self.stages} must be at least 1; try 1")
        if min(self.costs, default=0.0) < 0 or self.first < 0 or self.last < 0:
            raise PartitionError(f"costs={list(self.costs)} must not be negative; try 0")
        limited = self.stage_bytes is not None or self.device_bytes is not None
        if limited and (self.bytes is None or len(self.bytes) != len(self.costs)):
            have = 0 if self.bytes is None else len(self.bytes)
            raise PartitionError(f"bytes has {have} numbers but must have one per block; try {len(self.costs)}")
        devices = self.devices
        if devices and self.stages % devices:
            raise PartitionError(f"stages={self.stages} must be a multiple of the {devices} numbers of device_bytes")
        if self.placement == "v" and devices and self.stages != 2 * devices:
            raise PartitionError(f"stages={self.stages} must be 2 * {devices} devices for placement 'v'")
        before = -1
        for block, stage in sorted(self.pinned.items()):
            if not (0 <= block < len(self.costs) and 0 <= stage < self.stages):
                last = f"{len(self.costs) - 1} in stage {self.stages - 1}"
                raise PartitionError(f"pinned={{{block}: {stage}}} is out of range; the last block is {last}")
            if stage < before:
                raise PartitionError(f"pinned={{{block}: {stage}}} must not lie before stage {before}; try {before}")
            before = stage

    @property
    def devices(self) -> int:
        """How many devices have a limit of their own."""
        return 0 if self.device_bytes is None else len(self.device_bytes)

    def device_of(self, stage: int) -> int:
        """Where a stage lives."""
        if self.placement == "v":
            return min(stage, self.stages - 1 - stage)
        return stage % self.devices
