"""What the two drop-in layers share: their options, and how the inputs of a call are told apart."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxpipe.errors import ConfigError, whole_number
from jaxpipe.runtime.layer.sweeps import Inputs, Sweeps
from jaxpipe.runtime.layout.mesh import PIPE, check_axes, make_mesh
from jaxpipe.runtime.model import Tree
from jaxpipe.runtime.options import stage_counts
from jaxpipe.runtime.stage.carry import part
from jaxpipe.runtime.stage.stage import Remat
from jaxpipe.schedule import Schedule, build
from jaxpipe.schedule.ir import check_schedule

INPUTS = ("split", "shared", "constant")
"""``split``: rows like x, with gradients; ``shared``: the same for all rows; ``constant``: split, no gradients."""


def make_sweeps(
    apply: Callable,
    num_layers: int,
    *,
    mesh: Any,
    schedule: Schedule | None,
    microbatches: int | None,
    repeats: int,
    stages: Sequence[int] | str | None,
    remat: Remat | Sequence[Remat],
    scan_blocks: bool,
) -> Sweeps:
    """The pipeline of a layer's blocks.

    Args:
        apply: ``(params, x, *inputs, key=…) -> x``.
        num_layers: Number of blocks.
        mesh: From `make_mesh`; None: one device.
        schedule: What runs, or None for one that is made of `microbatches` and `repeats`.
        microbatches: M; by default 1 on one device.
        repeats: V.
        stages: See `Pipeline`.
        remat: See `Pipeline`.
        scan_blocks: See `Pipeline`.

    Raises:
        ConfigError: Options that do not go together.
        PartitionError: The blocks do not divide into stages.
        ScheduleError: The schedule does not fit.
    """
    mesh = make_mesh(pipe=1) if mesh is None else mesh
    check_axes(mesh)
    devices, repeats = mesh.shape[PIPE], whole_number("repeats", repeats)
    microbatches = microbatches if microbatches is None else whole_number("microbatches", microbatches)
    if schedule is None:
        if microbatches is None and devices > 1:
            raise ConfigError(
                f"microbatches=None must be a number on a mesh with pipe={devices}; try microbatches={4 * devices}"
            )
        name = "circular" if repeats > 1 else "gpipe"
        schedule = build(name, devices=devices, microbatches=microbatches or 1, repeats=repeats)
    else:
        check_schedule(schedule)
    if microbatches not in (None, schedule.microbatches) or repeats not in (1, schedule.repeats):
        raise ConfigError(
            f"microbatches={microbatches} and repeats={repeats} must agree with the schedule's "
            f"{schedule.microbatches} and {schedule.repeats}; try leaving them out"
        )
    # Options of a layer are hashed.
    kept: Any = tuple(remat) if isinstance(remat, list) else remat
    stages = stages if stages is None or isinstance(stages, str) else stage_counts(stages, num_layers, schedule)

    def block(params: Tree, x: Tree, inputs: Inputs, key: Any) -> Tree:
        found = {**inputs.riding, **inputs.resting, **inputs.shared}
        return apply(params, x, *(found[str(n)] for n in range(len(found))), key=key)

    return Sweeps(block, num_layers, schedule, mesh, stages, kept, scan_blocks)


def sort_inputs(declared: Sequence[str], given: Sequence[Tree]) -> Inputs:
    """Tells a call's inputs apart; those that are not declared are ``split``.

    Raises:
        ConfigError: More are declared than given.
    """
    if len(declared) > len(given):
        raise ConfigError(
            f"inputs={tuple(declared)} declares {len(declared)} inputs beside x but the call has {len(given)}; "
            f"try inputs={tuple(declared[: len(given)])}"
        )
    kinds = [*declared, *["split"] * (len(given) - len(declared))]
    sorted_ = Inputs({}, {}, {})
    for n, (kind, value) in enumerate(zip(kinds, given, strict=True)):
        rides = kind == "split" and part(value)[0]
        where = sorted_.shared if kind == "shared" else sorted_.riding if rides else sorted_.resting
        where[str(n)] = jax.tree.map(jax.numpy.asarray, value)
    return sorted_


def check_inputs(declared: Sequence[str]) -> tuple[str, ...]:
    """The declaration as a tuple.

    Raises:
        ConfigError: An unknown word.
    """
    if isinstance(declared, str):
        raise ConfigError(f"inputs={declared!r} must be a sequence of words; try inputs=({declared!r},)")
    for kind in declared:
        if kind not in INPUTS:
            raise ConfigError(f"inputs={tuple(declared)} must be of {', '.join(map(repr, INPUTS))}; try 'split'")
    return tuple(declared)
