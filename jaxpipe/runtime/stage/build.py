"""From a model and a layout to the lane functions of its stages, by shapes alone; and the checks that need shapes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.errors import PartitionError
from jaxpipe.runtime.layout.casts import cast_dtypes
from jaxpipe.runtime.layout.relayout import Layout
from jaxpipe.runtime.layout.rest import check_specs, tensor_dims
from jaxpipe.runtime.layout.tree import tie
from jaxpipe.runtime.model import Block, Model, Tree, carry_and_aux
from jaxpipe.runtime.stage.carry import has_gradient
from jaxpipe.runtime.stage.ends import accumulator_dtype, shared_leaves
from jaxpipe.runtime.stage.stage import Context, Remat, Run, Stage
from jaxpipe.runtime.stage.stages import Accumulator, Branch, Stages


def build_stages(
    model: Model, layout: Layout, remats: Sequence[Remat], params: Tree, carry: Tree, context: Context, walls: bool
) -> Stages:
    """The lane functions of all stages.

    Args:
        model: The model.
        layout: Where its blocks live.
        remats: What each stage keeps, in stage order.
        params: Shapes of the pipeline parameters.
        carry: Shapes of the embedding's output.
        context: Shapes of what lanes know of a microbatch.
        walls: Whether stages have walls between their blocks, see `jaxpipe.runtime.stage.wall`.

    Raises:
        PartitionError: A block does not return what it was given, or has parameters that are not floating-point.
    """
    schedule = layout.schedule
    kinds = {block.kind: block for block in model.blocks}
    shared = shared_leaves(model, params["embed"])
    one_block = one_of_each(layout, params)
    for part in ("embed", "head"):
        check_annotations(model, layout, part, params.get(part, {}))
    for kind in kinds:
        check_annotations(model, layout, f"blocks/{kind}", one_block[kind])
    aux: dict[str, Any] = {}
    aux_blocks: Counter[str] = Counter()
    for kind in kinds:
        own = tie(one_block[kind], params["embed"], model.block_tie(kind))
        for name, dtype in check_block(model, kind, own, carry, context).items():
            dtype = jnp.promote_types(accumulator_dtype(dtype), getattr(aux.get(name), "dtype", jnp.float32))
            aux[name] = jax.ShapeDtypeStruct((), dtype)
            aux_blocks[name] += layout.kinds.count(kind)
    casts = {
        kind: _casts(block, one_block[kind], shared, model.block_tie(kind), carry, context)
        for kind, block in kinds.items()
    }
    weights = [[_shapes(casts[p.kind], p.count) for p in row] for row in layout.positions]
    places, accumulators = _accumulators(layout, weights)
    made: dict[Any, Stage] = {}

    def stage(number: int) -> Stage:
        runs = [(layout.kinds[run[0]], len(run) if layout.scan else None) for run in layout.runs(number)]
        key = tuple(runs), remats[number]
        if key not in made:
            made[key] = Stage(
                runs=[Run(kinds[kind].apply, model.block_tie(kind), count) for kind, count in runs],
                remat=remats[number],
                params={"blocks": [_shapes(casts[kind], count) for kind, count in runs], "shared": shared},
                carry=carry,
                context=context,
                aux=aux,
                walls=walls,
            )
        return made[key]

    branches: dict[Any, Branch] = {}
    numbers = []
    for repeat in range(schedule.repeats):
        row = []
        for device in range(schedule.devices):
            at = schedule.stage_at(device, repeat)
            branch = Branch(repeat, layout.places[at], stage(at))
            key = repeat, branch.positions, id(branch.stage)
            branches.setdefault(key, branch)
            row.append(list(branches).index(key))
        numbers.append(tuple(row))
    return Stages(
        schedule=schedule,
        branches=list(branches.values()),
        number=tuple(numbers),
        first=tuple(
            tuple(layout.first[schedule.stage_at(d, c)] for d in range(schedule.devices))
            for c in range(schedule.repeats)
        ),
        places=places,
        accumulators=accumulators,
        weights=weights,
        aux_blocks=aux_blocks,
    )


def check_block(model: Model, kind: str, params: Tree, carry: Tree, context: Context) -> dict[str, Any]:
    """The dtypes of what the blocks of a kind return as aux, by name.

    Raises:
        PartitionError: It returns another structure, shape or dtype than it was given, or another aux than numbers.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    number, block = next((n, block) for n, block in enumerate(model.blocks) if block.kind == kind)
    out = jax.eval_shape(block.apply, params, carry, context.mb, key)
    out, aux = carry_and_aux(carry, out)
    pair = isinstance(out, tuple) and len(out) == 2 and jax.tree.structure(out[0]) == jax.tree.structure(carry)
    if pair and not aux and isinstance(out[1], Mapping):
        raise PartitionError(
            f"block {number} returns an aux of {jax.tree.map(_text, out[1])} but a dict must hold floating-point "
            "numbers, of which 'loss' joins the loss; try {'loss': …}"
        )
    if pair and not aux:
        raise PartitionError(
            f"block {number} returns an aux of {jax.tree.map(_text, out[1])} but it must be one floating-point number; "
            "try its sum or mean"
        )
    check_carry(number, carry, out)
    return {name: x.dtype for name, x in aux.items()}


def check_carry(number: int, carry: Tree, out: Tree) -> None:
    """Raises PartitionError unless a block returns the structure, shapes and dtypes that it was given."""
    if jax.tree.structure(carry) != jax.tree.structure(out):
        raise PartitionError(
            f"block {number} returns {jax.tree.structure(out)} but must return the structure of its input; "
            f"try {jax.tree.structure(carry)}"
        )
    for (path, a), b in zip(jax.tree.leaves_with_path(carry), jax.tree.leaves(out), strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise PartitionError(
                f"block {number} returns {_text(b)} at carry{jax.tree_util.keystr(path)} but must return "
                f"what it was given; try {_text(a)}"
            )


def check_params(params: Tree) -> None:
    """Raises PartitionError for a parameter that has no gradient."""
    for path, leaf in jax.tree.leaves_with_path(params):
        if not has_gradient(leaf):
            raise PartitionError(
                f"parameter {jax.tree_util.keystr(path)} is {_text(leaf)} but parameters must be floating-point, for "
                "they have gradients; try it in the batch, in the carry, or as a constant"
            )


def check_kinds(model: Model) -> None:
    """Raises PartitionError where blocks of one kind have different apply functions."""
    seen: dict[str, tuple[int, Block]] = {}
    for number, block in enumerate(model.blocks):
        first, other = seen.setdefault(block.kind, (number, block))
        if block.apply != other.apply:
            raise PartitionError(
                f"blocks {first} and {number} are of kind={block.kind!r} but have different apply functions; "
                f"try the same function for both, or kind='{block.kind}{number}' for block {number}"
            )
        if (own := _dims(block)) != (others := _dims(other)):
            raise PartitionError(
                f"blocks {first} and {number} are of kind={block.kind!r} but cut {others} and {own} over 'tensor'; "
                f"try the same specs for both, or kind='{block.kind}{number}' for block {number}"
            )


def annotations(model: Model, cut: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """The dims that lie on the axis `tensor`, for `Layout`.

    Args:
        model: The model.
        cut: Leaves of embedding and head that are cut by vocabulary over `pipe`, and so not over `tensor`.
    """
    ends = {part: dict(_dims(end)) for part, end in (("embed", model.embed), ("head", model.head_loss))}
    for part, path in cut.items():
        ends[part].pop(path, None)
    return ends | {f"blocks/{block.kind}": _dims(block) for block in model.blocks}


def check_annotations(model: Model, layout: Layout, part: str, params: Tree) -> None:
    """Raises PartitionError where annotations do not fit the parameters.

    Args:
        model: The model.
        layout: Where they live.
        part: ``embed``, ``head`` or ``blocks/KIND``.
        params: Shapes of its parameters, of one block.
    """
    kind = part.removeprefix("blocks/")
    tied = {"embed": (), "head": model.head_tie}.get(part, model.block_tie(kind))
    must_divide = 1 if part in ("embed", "head") else layout.sizes.tensor
    check_specs(part, layout.tensor.get(part, {}), params, tuple(tied), must_divide)


def _dims(part: Any) -> dict[str, int]:
    return tensor_dims(getattr(part, "specs", {}))


def _text(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def one_of_each(layout: Layout, params: Tree) -> Mapping[str, Tree]:
    """Shapes of one block of each kind."""
    found: dict[str, Tree] = {}
    for row, trees in zip(layout.positions, params["blocks"], strict=True):
        for position, tree in zip(row, trees, strict=True):
            lead = 1 if position.count is None else 2
            shapes = jax.tree.map(lambda s, n=lead: jax.ShapeDtypeStruct(s.shape[n:], s.dtype), tree)
            found.setdefault(position.kind, shapes)
    return found


def _casts(block: Any, own: Tree, shared: Tree, ties: Mapping[str, str], carry: Tree, context: Context) -> Tree:
    """Shapes of one block's own parameters, with the dtypes that it computes with."""

    def run(own, shared, carry, mb, key):
        return block.apply(tie(own, shared, ties), carry, mb, key)

    key = jax.eval_shape(lambda: jax.random.key(0))
    dtypes = cast_dtypes(run, own, shared, carry, context.mb, key)
    return jax.tree.map(lambda s, dtype: jax.ShapeDtypeStruct(s.shape, dtype), own, dtypes)


def _shapes(block: Tree, count: int | None) -> Tree:
    """Shapes of a position's parameters from those of one block."""
    lead = () if count is None else (count,)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct((*lead, *s.shape), s.dtype), block)


def _accumulators(layout: Layout, weights: list) -> tuple[tuple[tuple[int, ...], ...], list[Accumulator]]:
    """One accumulator for each place that any repeat has: which one each position uses, and what they look like."""
    keys = list(dict.fromkeys(key for row in layout.keys for key in row))
    accumulators = []
    for key in keys:
        holders = [repeat for repeat, row in enumerate(layout.keys) if key in row]
        shapes = [weights[repeat][layout.keys[repeat].index(key)] for repeat in holders]
        longest = max(shapes, key=lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree)))
        rows = tuple(holders.index(c) if c in holders else None for c in range(layout.schedule.repeats))
        accumulators.append(Accumulator(longest, rows))
    return tuple(tuple(keys.index(key) for key in row) for row in layout.keys), accumulators
