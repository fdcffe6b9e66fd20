"""All stages of a model as the branches that one program chooses from.

Every device runs the same program, but stages differ: in the weights (one set per repeat), and, where a model is split
unevenly or has several kinds of block, in what they compute. A *branch* is one way to compute on the weights of one
repeat; a table of numbers says which branch a device takes for which repeat. Models of equal stages have one branch per
repeat.

Gradients are added up where it is known when traced which branch made them, in arrays of their own for each repeat and
position, like the weights. Elsewhere in *accumulators*: one for each position of the repeat that has most, a row per
repeat.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.runtime.model import Tree
from jaxpipe.runtime.stage.pool import Pool
from jaxpipe.runtime.stage.stage import Stage
from jaxpipe.schedule import Schedule


@dataclass(frozen=True)
class Branch:
    """One way to compute a stage.

    Attributes:
        repeat: Whose weights it takes.
        positions: Which of the repeat's positions hold its runs, in order.
        stage: Its lane functions.
    """

    repeat: int
    positions: tuple[int, ...]
    stage: Stage


@dataclass(frozen=True)
class Choice:
    """What a device may run in a lane.

    Attributes:
        branch: The stage.
        first: Whether the embedding, or its gradient, is part of it.
        last: Whether the head is part of it.
    """

    branch: Branch
    first: bool = False
    last: bool = False


@dataclass(frozen=True)
class Choices:
    """All that the devices may run in a lane.

    Attributes:
        each: The choices.
        number: By repeat and device, which of them a device takes; -1 where it has nothing to run.
    """

    each: Sequence[Choice]
    number: tuple[tuple[int, ...], ...]

    def index(self, repeat, device):
        """Which choice a device takes for a repeat; -1 for repeat -1."""
        if all(number in (-1, c) for c, row in enumerate(self.number) for number in row):
            return repeat
        return jnp.where(repeat < 0, -1, jnp.asarray(self.number, jnp.int32)[jnp.maximum(repeat, 0), device])


@dataclass(frozen=True)
class Accumulator:
    """Gradient sums of one position, for all repeats that have it.

    Attributes:
        params: Shapes of one repeat's leaves, without the device dim.
        rows: By repeat, its row, or None if the repeat has no such position.
    """

    params: Tree
    rows: tuple[int | None, ...]

    @property
    def num_rows(self) -> int:
        """Repeats that have the position."""
        return sum(row is not None for row in self.rows)


@dataclass(frozen=True)
class Stages:
    """See the module.

    Attributes:
        schedule: What runs.
        branches: All branches.
        number: By repeat and device, which branch it takes.
        first: By repeat and device, the number of its first block.
        places: By repeat and position, its accumulator.
        accumulators: The gradient sums.
        weights: By repeat and position, shapes of the weights as the lanes see them, without the device dim.
        aux_blocks: How many blocks of the model return each name of aux.
    """

    schedule: Schedule
    branches: Sequence[Branch]
    number: tuple[tuple[int, ...], ...]
    first: tuple[tuple[int, ...], ...]
    places: tuple[tuple[int, ...], ...]
    accumulators: Sequence[Accumulator] = field(repr=False)
    weights: Sequence[Sequence[Tree]] = field(repr=False)
    aux_blocks: Mapping[str, int] = field(default_factory=dict)

    @property
    def stage(self) -> Stage:
        """Any stage: carry, context and aux are the same for all."""
        return self.branches[0].stage

    @cached_property
    def residuals(self) -> Pool:
        """The form of a residual slot."""
        return Pool.union([branch.stage.residuals for branch in self.branches])

    @cached_property
    def weight_residuals(self) -> Pool:
        """The form of a weight-residual slot."""
        return Pool.union([branch.stage.weight_residuals for branch in self.branches])

    @property
    def gradients(self) -> dict:
        """Shapes of what a backward makes: a tree per accumulator, and the leaves that blocks share."""
        return {"blocks": [a.params for a in self.accumulators], "shared": self.stage.params["shared"]}

    def choices(self, used: Iterable[tuple[int, int]], first: bool = False, last: bool = False) -> Choices:
        """What the devices choose from in a lane.

        Args:
            used: The stages that run there, as repeat and device.
            first: Whether the first stage is a choice of its own, together with the embedding.
            last: Whether the last stage is, together with the head.
        """
        schedule = self.schedule
        number = [[-1] * schedule.devices for _ in range(schedule.repeats)]
        each: list[Choice] = []
        for repeat, device in sorted(set(used)):
            stage = schedule.stage_at(device, repeat)
            branch = self.branches[self.number[repeat][device]]
            choice = Choice(branch, first and stage == 0, last and stage == schedule.stages - 1)
            if choice not in each:
                each.append(choice)
            number[repeat][device] = each.index(choice)
        return Choices(each, tuple(map(tuple, number)))

    def first_block(self, repeat, device):
        """The number of the first block of a device's stage."""
        return jnp.asarray(self.first, jnp.int32)[repeat, device]

    def rows(self, repeat) -> list:
        """The row of each accumulator that belongs to a repeat; any row where it has none."""
        return [
            repeat
            if list(a.rows) == list(range(self.schedule.repeats))
            else jnp.asarray([row or 0 for row in a.rows], jnp.int32)[repeat]
            for a in self.accumulators
        ]

    def apart(self, sums: Sequence[Tree]) -> list:
        """What the accumulators hold, by repeat and position, like `weights`."""

        def of(repeat: int, number: int, weights: Tree) -> Tree:
            accumulator = self.accumulators[number]
            own = sums[number]
            if accumulator.num_rows > 1:
                own = jax.tree.map(lambda leaf: leaf[accumulator.rows[repeat]], own)
            return jax.tree.map(_cut, own, weights)

        known = zip(self.places, self.weights, strict=True)
        return [[of(repeat, *each) for each in zip(*row, strict=True)] for repeat, row in enumerate(known)]

    def params(self, branch: Branch, blocks: Sequence[Sequence[Tree]], shared: Tree) -> Tree:
        """What a branch's lanes take as parameters, from ``blocks[repeat][position]``."""
        own = [
            _first(blocks[branch.repeat][p], run.count)
            for p, run in zip(branch.positions, branch.stage.runs, strict=True)
        ]
        return {"blocks": own, "shared": shared}

    def spread(self, branch: Branch, gradient: Tree, zeros: Any) -> dict:
        """The gradient of a branch's parameters in the form of `gradients`.

        Args:
            branch: Whose.
            gradient: Like `params`.
            zeros: ``shapes -> arrays``, for what the branch does not have.
        """
        own = {
            self.places[branch.repeat][p]: tree for p, tree in zip(branch.positions, gradient["blocks"], strict=True)
        }
        rest = {n: a.params for n, a in enumerate(self.accumulators) if n not in own}
        whole = own | dict(zip(rest, zeros(list(rest.values())), strict=True))
        blocks = [pad(whole[n], accumulator.params) for n, accumulator in enumerate(self.accumulators)]
        return {"blocks": blocks, "shared": gradient["shared"]}


def _first(tree: Tree, count: int | None) -> Tree:
    """The first blocks of a stacked position."""
    return tree if count is None else jax.tree.map(lambda x: x if x.shape[0] == count else x[:count], tree)


def pad(tree: Tree, like: Tree) -> Tree:
    """Leaves with zeros for the blocks that a shorter run lacks."""

    def padded(leaf, like):
        if leaf.shape == like.shape:
            return leaf
        return jnp.pad(leaf, [(0, like.shape[0] - leaf.shape[0])] + [(0, 0)] * (leaf.ndim - 1))

    return jax.tree.map(padded, tree, like)


def _cut(leaf, like):
    """The blocks of a shorter run."""
    return leaf if leaf.shape == like.shape else leaf[: like.shape[0]]
