"""What a plan keeps on every device, in bytes.

All devices run one program, so they all have the same buffers: slots for the device that keeps most, weights in the
form of the largest stage of each repeat. While a step runs there are

    weights       parameters at rest
    optimizer     two moments of each
    activations   slots: inputs, residuals, arriving gradients, what I leaves for W; carries under way
    buffers       gradient sums, embedding and head gathered with their gradients, weights gathered or in the compute
                  dtype, the working memory of one lane

The last two are the terms of `TickTable.bytes`. The weight gradients that a lane makes lie in memory of their own
before they are added to the sums, and count as working memory; where lanes are conditionals (`ModelCosts.conditional`),
so does what I leaves for W, of which only the larger counts: I is done when W begins. Conditionals that do not write
slots themselves (`commits_inside`) need one more slot of a stash, for idle lanes.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise

from jaxpipe.plan.cost import ModelCosts, Remat, accumulator_bytes
from jaxpipe.schedule import ModelBytes
from jaxpipe.schedule.ir import Placement
from jaxpipe.schedule.lowering.table import Slots, temporary_bytes

ACTIVATIONS = ("activation slots", "residual slots", "gradient slots", "weight-residual slots", "two carries")


@dataclass(frozen=True)
class Memory:
    """Bytes per device.

    Attributes:
        weights: Parameters at rest.
        optimizer: State of AdamW.
        activations: Slots and carries.
        buffers: Everything else that a step needs.
        lent: How much of activations and buffers lies in the arrays of the gradients, where a step gives those back.
    """

    weights: float
    optimizer: float
    activations: float
    buffers: float
    lent: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.optimizer + self.activations + self.buffers

    @property
    def temporary(self) -> float:
        """What XLA reports as the temporaries of the step without optimizer."""
        return self.activations + self.buffers - self.lent


@dataclass(frozen=True)
class StageBlocks:
    """The kinds of block in every stage, by number.

    Attributes:
        kinds: Per stage, how many of each kind.
        devices: P.
        placement: Which stage is where.
    """

    kinds: tuple[Counter[str], ...]
    devices: int
    placement: Placement

    @property
    def repeats(self) -> int:
        """Stages per device."""
        return len(self.kinds) // self.devices

    @cached_property
    def stored(self) -> Counter[str]:
        """Blocks whose room a device has: of each repeat's largest stage, kind by kind."""
        total: Counter[str] = Counter()
        for repeat in range(self.repeats):
            largest: Counter[str] = Counter()
            for device in range(self.devices):
                largest |= self.kinds[self._stage_at(device, repeat)]
            total += largest
        return total

    @cached_property
    def distinct(self) -> tuple[tuple[tuple[str, int], ...], ...]:
        """The stages without repetition, as (kind, number) pairs."""
        return tuple(dict.fromkeys(tuple(row.items()) for row in self.kinds))

    def _stage_at(self, device: int, repeat: int) -> int:
        if self.placement == "v":
            return device if repeat == 0 else 2 * self.devices - 1 - device
        return repeat * self.devices + device


@lru_cache(maxsize=4096)
def stage_blocks(counts: tuple[int, ...], kinds: tuple[str, ...], devices: int, placement: Placement) -> StageBlocks:
    """What each stage holds, from the number of blocks per stage and the kinds in order."""
    edges = [0, *accumulate(counts)]
    rows = tuple(Counter(kinds[a:b]) for a, b in pairwise(edges))
    return StageBlocks(rows, devices, placement)


def stored_params(costs: ModelCosts, blocks: StageBlocks) -> float:
    """Parameters of blocks that a device holds."""
    return sum(costs.blocks[kind].params * n for kind, n in blocks.stored.items())


def made_bytes(costs: ModelCosts, blocks: StageBlocks) -> float:
    """The weight gradients that the lane of a largest stage makes."""
    params = max(sum(costs.blocks[kind].params * n for kind, n in row) for row in blocks.distinct)
    return params * min(costs.dtype_bytes, costs.param_bytes)


def model_bytes(
    costs: ModelCosts, blocks: StageBlocks, remat: Remat, *, split: bool, gathers: bool, vocab_parallel: bool = False
) -> ModelBytes:
    """The sizes that a tick table multiplies, by formula or measurement.

    Args:
        costs: Of the model.
        blocks: What each stage holds.
        remat: What forwards keep.
        split: Whether backwards are split into I and W.
        gathers: Whether weights are gathered before the loop (FSDP).
        vocab_parallel: Whether embedding and head stay cut.
    """

    def largest_sum(by_kind: Mapping[str, float], less: float = 0.0) -> float:
        return max(sum(by_kind[k] * n for k, n in row) - less * bool(row) for row in blocks.distinct)

    def largest(name: str, less: float) -> float:
        return largest_sum({kind: getattr(block, name)[remat] for kind, block in costs.blocks.items()}, less)

    low = min(costs.dtype_bytes, costs.param_bytes)
    # [1] The input of a stage's first block rests in an activation slot, not among the residuals. What I leaves for W
    # has the gradient that arrives, and with "full" the input of each block.
    residual = largest("residual_bytes", costs.carry_bytes if remat != "full" else 0.0)
    crossing = largest("weight_residual_bytes", 0.0 if remat == "full" else -costs.carry_bytes)
    working = costs.stage_working_bytes + largest("split_working_bytes" if split else "working_bytes", 0.0)
    made = made_bytes(costs, blocks)
    working += max(made, crossing) if costs.conditional and split else made
    stored = stored_params(costs, blocks)
    shares = blocks.devices if vocab_parallel else 1
    ends, embed = costs.ends_params / shares, costs.embed_params / shares
    casts = gathers or costs.dtype_bytes < costs.param_bytes
    # [2] Devices that share the words take as many tokens more at once, so long as there are several chunks.
    head = costs.head_working_bytes * (min(1.0, costs.head_chunks / blocks.devices) if vocab_parallel else 1.0)
    return ModelBytes(
        carry=round(costs.carry_bytes),
        residual=round(max(0.0, residual)),
        backward=round(max(working, head)),
        ends=round(ends * low + embed * (costs.param_bytes - low)),
        ends_gradient=round(ends * accumulator_bytes(costs)),
        stage_gradient=round(stored * accumulator_bytes(costs)),
        casts=round(stored * low) if casts else 0,
        weight_residual=round(max(0.0, crossing)) if split else 0,
    )


def commits_inside(costs: ModelCosts, blocks: StageBlocks) -> bool:
    """Whether lanes are conditionals that write slots and add to sums themselves (`jaxpipe.runtime.loop.lane`)."""
    alike = blocks.repeats == 1 and len(blocks.distinct) == 1
    return costs.conditional and (costs.passes_in_place or alike)


def terms(slots: Slots, placement: Placement, model: ModelBytes, *, scratch: bool) -> dict[str, int]:
    """The program's temporaries, term by term.

    Args:
        slots: How many buffers there are.
        placement: Of the schedule.
        model: Sizes of the pieces.
        scratch: Whether idle lanes write stashes too, into a slot of their own.
    """
    found = temporary_bytes(slots, placement, model)
    if not scratch:
        found["residual slots"] -= model.residual
        if slots.weight_residual:
            found["weight-residual slots"] -= model.weight_residual
    return found


def memory(
    slots: Slots, model: ModelBytes, costs: ModelCosts, blocks: StageBlocks, *, fsdp: int, moments: int = 2
) -> Memory:
    """Bytes per device.

    Args:
        slots: How many buffers there are.
        model: Sizes of the pieces.
        costs: Of the model.
        blocks: What each stage holds.
        fsdp: Devices that parameters and optimizer are spread over.
        moments: Numbers that the optimizer keeps per parameter.
    """
    stored = stored_params(costs, blocks)
    resting = (stored + costs.ends_params / blocks.devices) * costs.param_bytes / fsdp
    scratch = costs.conditional and not commits_inside(costs, blocks)
    parts = terms(slots, blocks.placement, model, scratch=scratch)
    activations = sum(size for name, size in parts.items() if name in ACTIVATIONS or name.endswith("carries"))
    # [1] Until they are written, the gradients' arrays are room for sums and for weight gradients on their way there.
    # The sums of several repeats are one array where lanes are conditionals, and fit in none of these; smaller things
    # do, and of the room so lent three quarters are used, in what was compiled for H100s.
    apart = blocks.repeats == 1 or not costs.conditional
    room = 1.0 if apart and fsdp == 1 else 0.75
    # [2] Weight gradients that lie where I left something for W do not need it.
    overlap = (
        min(made_bytes(costs, blocks), model.weight_residual) if costs.conditional and slots.weight_residual else 0.0
    )
    return Memory(
        weights=resting,
        optimizer=moments * resting,
        activations=activations,
        buffers=sum(parts.values()) - activations,
        lent=max(0.0, room * resting - overlap),
    )
