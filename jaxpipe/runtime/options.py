"""What a user may write for the options of a `Pipeline`, and what is meant by it."""

import operator
import warnings
from collections.abc import Sequence
from math import gcd
from typing import Any

from jax.sharding import Mesh

from jaxpipe.errors import ConfigError, PartitionError
from jaxpipe.runtime.layout.mesh import TENSOR
from jaxpipe.runtime.model import Model, VocabEmbed, VocabHead
from jaxpipe.runtime.stage.stage import Remat
from jaxpipe.schedule import Schedule
from jaxpipe.schedule.stages import even_stages, parse_stages

REMATS = ("full", "none", "all")


def stage_counts(stages: Sequence[int] | str | None, blocks: int, schedule: Schedule) -> tuple[int, ...]:
    """Blocks per stage.

    Args:
        stages: See `Pipeline`.
        blocks: How many the model has.
        schedule: What runs.

    Raises:
        PartitionError: They do not add up, or do not divide.
    """
    if stages is None:
        if blocks % schedule.stages:
            near = sorted({max(1, blocks // schedule.stages), -(-blocks // schedule.stages)})
            raise PartitionError(
                f"num_layers={blocks} must be a multiple of devices={schedule.devices} * repeats={schedule.repeats} = "
                f"{schedule.stages}; try num_layers={' or '.join(str(n * schedule.stages) for n in near)}, or "
                "stages='even'"
            )
        return (blocks // schedule.stages,) * schedule.stages
    if isinstance(stages, str):
        counts = even_stages(blocks, schedule.stages) if stages == "even" else parse_stages(stages, schedule.stages)
    else:
        counts = _whole(stages)
    if counts is None or len(counts) != schedule.stages or min(counts, default=0) < 0:
        given = stages if counts is None else list(counts)
        raise PartitionError(
            f"stages={given!r} must hold one number of blocks for each of devices={schedule.devices} * "
            f"repeats={schedule.repeats} = {schedule.stages} stages; try {list(even_stages(blocks, schedule.stages))}"
        )
    if sum(counts) != blocks:
        raise PartitionError(
            f"stages={list(counts)} hold {sum(counts)} blocks but the model has {blocks}; "
            f"try {list(even_stages(blocks, schedule.stages))}"
        )
    return counts


def _whole(numbers: Any) -> tuple[int, ...] | None:
    """A sequence of whole numbers, of NumPy's too, as Python's; None if it is anything else."""
    try:
        each = list(numbers)
        return None if any(isinstance(n, bool) for n in each) else tuple(map(operator.index, each))
    except TypeError:
        return None


def stage_remats(remat: Remat | Sequence[Remat], stages: int) -> tuple[Remat, ...]:
    """What each stage keeps, in stage order.

    Raises:
        ConfigError: An unknown value, or a sequence of another length.
    """
    each: tuple[Any, ...] = (remat,) * stages
    if isinstance(remat, Sequence) and not isinstance(remat, str):
        each = tuple(remat)
    if len(each) != stages:
        raise ConfigError(f"remat={list(each)} must hold one value for each of {stages} stages; try 'full' for all")
    for value in each:
        if value not in REMATS and not callable(value):
            near = "'none'" if value is None or value is False else "'full'"
            raise ConfigError(
                f"remat={value!r} must be one of {', '.join(REMATS)} or a policy of jax.checkpoint; try {near}"
            )
    return each


def vocab_leaves(model: Model, head: str) -> dict[str, str]:
    """The leaves of embedding and head that stay cut by vocabulary, see `jaxpipe.runtime.stage.ends.Ends`.

    Raises:
        ConfigError: An unknown value, or a model whose ends are not made for it.
    """
    if head == "last":
        return {}
    if head != "vocab_parallel":
        raise ConfigError(f"head={head!r} must be 'last' or 'vocab_parallel'; try 'last'")
    way_in, way_out = model.embed, model.head_loss
    if not isinstance(way_out, VocabHead):
        raise ConfigError(
            f"head='vocab_parallel' needs a model whose head_loss is a VocabHead, not {type(way_out).__name__}; "
            "try head='last'"
        )
    cut = {"embed": way_in.table} if isinstance(way_in, VocabEmbed) else {}
    for user, source in model.tie.items():
        if user != f"head/{way_out.kernel}" and source == f"embed/{cut.get('embed')}":
            raise ConfigError(
                f"head='vocab_parallel' cuts {source!r} by vocabulary, which tie={{{user!r}: {source!r}}} needs whole; "
                "try head='last'"
            )
    tied = model.head_tie
    if way_out.kernel not in tied:
        return cut | {"head": way_out.kernel}
    if tied[way_out.kernel] != cut.get("embed"):
        raise ConfigError(
            f"head='vocab_parallel' with tie={{'head/{way_out.kernel}': 'embed/{tied[way_out.kernel]}'}} needs a "
            f"VocabEmbed with table={tied[way_out.kernel]!r}, not {type(way_in).__name__}; try head='last'"
        )
    return cut


def check_offload(mesh: Mesh) -> bool:
    """True; warns where it is of no use.

    Raises:
        ConfigError: The devices have no memory on the host.
    """
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        warnings.warn("offload=True has no effect on CPU devices: their memory is the host's", stacklevel=3)
        return False
    kinds = {memory.kind for memory in device.addressable_memories()}
    if kinds and "pinned_host" not in kinds:  # none are known where devices are only compiled for
        raise ConfigError(
            f"offload=True needs devices with the memory kind 'pinned_host', but {device.platform} has "
            f"{', '.join(sorted(kinds))}; try offload=False"
        )
    return True


def check_tensor(model: Model, mesh: Mesh) -> None:
    """Raises ConfigError where the axis `tensor` does not divide what the model says that it must."""
    tensor = mesh.shape.get(TENSOR, 1)
    numbers = model.divisible_by_tensor
    common = gcd(*numbers.values())
    for name, number in numbers.items():
        if number % tensor:
            near = [n for n in range(1, common + 1) if common % n == 0]
            below, above = max(n for n in near if n < tensor), [n for n in near if n > tensor][:1]
            raise ConfigError(
                f"{name}={number} must be divisible by mesh.tensor={tensor}; "
                f"try mesh.tensor={' or '.join(map(str, [below, *above]))}"
            )
