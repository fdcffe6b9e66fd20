"""Optimizers that see the model's separate layers, run on the pipeline's stacked leaves.

A block leaf of the pipeline tree is ``[P, ...]`` (``[P, count, ...]`` where blocks are scanned over): one layer per
device and place, its *lanes*. An optimizer must not see that:
weight decay asks for a leaf's ndim, LAMB and Adafactor for its norm or its rows, global-norm clipping for the norm of
the whole model. Splitting the leaf into P leaves would make XLA copy every layer to every device.

So the transformation is traced once on a tree with one lane of each leaf, and the traced program is run on the stacked
leaves, equation by equation:

    what stems from one leaf           runs on all its lanes side by side (`jax.vmap`): the layers stay separate
    a scalar that joins several leaves is a reduction over the model (add, max, min, and, or): the lanes are reduced
                                       with the same operation first, so that every layer counts
    everything else                    is global and runs once

No equation moves a layer to another device. Leaves may be cut over `fsdp` and `tensor` besides: the compiler sees to
that, and every value is the global one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from jaxpipe.errors import ConfigError
from jaxpipe.jax_internals import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, eval_jaxpr
from jaxpipe.runtime.layout.relayout import Layout, Position
from jaxpipe.runtime.layout.rest import Rest, block_rest, end_rest
from jaxpipe.runtime.model import Tree

REDUCTIONS: dict[str, Callable] = {
    "add": jnp.sum,
    "add_any": jnp.sum,
    "max": jnp.max,
    "min": jnp.min,
    "and": jnp.all,
    "or": jnp.any,
}
"""Over the lanes that hold a layer: a device of a short stage has none in some places."""
CALLS = ("pjit", "jit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint")
MIXED = "mixed"
"""Tag of a partial reduction over several leaves."""


@dataclass(frozen=True)
class Lanes:
    """A value of the traced program.

    Attributes:
        array: The value; with a leading lane dim if `laned`.
        laned: Whether each lane has its own.
        tag: The leaf that it stems from, `MIXED`, or None for a global value.
    """

    array: Any
    laned: bool = False
    tag: Any = None

    @property
    def layers(self):
        """The array of the lanes that hold a layer."""
        held = np.flatnonzero(self.tag.real)
        return self.array if len(held) == len(self.tag.real) else self.array[held]


class Leaf(NamedTuple):
    """A block leaf as a tag: its path, and which of its lanes hold a layer."""

    path: tuple
    real: tuple[bool, ...]


def logical_optimizer(
    tx: optax.GradientTransformation, mesh: Mesh, layout: Layout
) -> optax.GradientTransformationExtraArgs:
    """Lifts a transformation of separate layers to the pipeline tree.

    Args:
        tx: Any optax transformation.
        mesh: The pipeline's mesh.
        layout: Where the layers live.

    Returns:
        A transformation whose `init` and `update` take pipeline trees. Its state is sharded like the gradients.

    Raises:
        ConfigError: From `init` or `update`, where `tx` joins leaves in a way that is not a reduction to a scalar.
    """
    inner = optax.with_extra_args_support(tx)

    def run(function: Callable, *trees, gives_updates: bool = False) -> Tree:
        paths, known = block_paths(trees[0]), dict(jax.tree.leaves_with_path(trees[0]))
        leaves, structure = jax.tree.flatten_with_path(trees)
        values = [_as_lanes(path, leaf, paths, layout) for path, leaf in leaves]
        one_lane = [jax.ShapeDtypeStruct(v.array.shape[v.laned :], v.array.dtype) for v in values]
        closed, out = jax.make_jaxpr(function, return_shape=True)(*jax.tree.unflatten(structure, one_lane))
        results = _run(closed.jaxpr, closed.consts, values)
        shapes, out_structure = jax.tree.flatten_with_path(out)
        placed = []
        for (path, shape), result in zip(shapes, results, strict=True):
            array, rest = _place(path, shape, result, paths, known, layout)
            # Updates lie where parameters do, state where gradients do.
            is_update = gives_updates and path[0] == jax.tree_util.SequenceKey(0)
            spec = layout.param_spec(rest) if is_update else rest.spec()
            placed.append(jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec)))
        return jax.tree.unflatten(out_structure, placed)

    @jax.jit
    def init(params: Tree) -> Tree:
        return run(inner.init, params)

    def update(updates: Tree, state: Tree, params: Tree | None = None, **extra: Any) -> tuple[Tree, Tree]:
        step = partial(run, lambda u, s, p, e: inner.update(u, s, p, **e), gives_updates=True)
        return step(updates, state, params, extra)

    return optax.GradientTransformationExtraArgs(init, update)


def block_paths(tree: Tree) -> set[tuple]:
    """The paths of the leaves that have lanes: those below `blocks`."""
    paths = {path for path, _ in jax.tree.leaves_with_path(tree)}
    return {path for path in paths if path[0] == jax.tree_util.DictKey("blocks")}


def find_path(path: tuple, paths: set[tuple]) -> tuple | None:
    """The parameter path that stands somewhere in a path of optimizer state."""
    for start in range(len(path)):
        for stop in range(len(path), start, -1):
            if path[start:stop] in paths:
                return path[start:stop]
    return None


def _position(path: tuple, layout: Layout) -> Position:
    """The position that a path ``blocks[repeat][position]...`` leads to."""
    return layout.positions[path[1].idx][path[2].idx]


def _as_lanes(path: tuple, leaf: Any, paths: set[tuple], layout: Layout) -> Lanes:
    leaf = jnp.asarray(leaf)
    found = find_path(path, paths)
    if found is not None:
        real = _position(found, layout).real
        return Lanes(leaf.reshape(real.size, *leaf.shape[real.ndim :]), True, Leaf(found, tuple(real.reshape(-1))))
    return Lanes(leaf, False, _end_tag(path))


def _end_tag(path: tuple) -> tuple | None:
    """The part of a path below `embed` or `head`, the same for a parameter, its gradient and its moments.

    Such a leaf has no lanes but is a leaf of its own. Anything else, like a step counter, is global.
    """
    for start, key in enumerate(path):
        if key in (jax.tree_util.DictKey("embed"), jax.tree_util.DictKey("head")):
            return path[start:]
    return None


def _run(jaxpr: Jaxpr, consts: Sequence, inputs: Sequence[Lanes]) -> list[Lanes]:
    env: dict[Any, Lanes] = dict(zip(jaxpr.constvars, map(Lanes, consts), strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom) -> Lanes:
        return Lanes(atom.val) if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, _run_eqn(jaxpr, eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _run_eqn(jaxpr: Jaxpr, eqn: JaxprEqn, values: list[Lanes]) -> list[Lanes]:
    name = eqn.primitive.name
    inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
    if name in CALLS and inner is not None:
        body, consts = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
        return _run(body, consts, values)
    if name == "cond" and not values[0].laned and any(v.laned for v in values):
        return _run_cond(eqn, values)
    tags = {v.tag for v in values if v.tag is not None}
    if name in REDUCTIONS and len(tags) > 1 and all(_shape(v) == () for v in eqn.outvars):
        arrays = [REDUCTIONS[name](v.layers).astype(v.array.dtype) if v.laned else v.array for v in values]
        return [Lanes(out, False, MIXED) for out in _bind(jaxpr, eqn, arrays)]
    if name == "concatenate" and len(tags) > 1 and len(_shape(eqn.outvars[0])) == 1:
        # Scalars of all leaves, stacked to be reduced: every lane becomes an entry.
        return [
            Lanes(out, False, MIXED)
            for out in _bind(jaxpr, eqn, [(v.layers if v.laned else v.array).reshape(-1) for v in values])
        ]
    tags.discard(MIXED)
    if not any(v.laned for v in values):
        tag = tags.pop() if len(tags) == 1 else None
        return [Lanes(out, False, tag) for out in _bind(jaxpr, eqn, [v.array for v in values])]
    if len(tags) > 1:
        raise ConfigError(
            f"the optimizer joins several layers by {name!r}, which is no reduction to a scalar; "
            f"try a transformation that joins leaves by one of {', '.join(REDUCTIONS)}"
        )
    mapped = jax.vmap(lambda *arrays: _bind(jaxpr, eqn, arrays), in_axes=[0 if v.laned else None for v in values])
    return [Lanes(out, True, *tags) for out in mapped(*(v.array for v in values))]


def _run_cond(eqn: JaxprEqn, values: list[Lanes]) -> list[Lanes]:
    """A global choice between branches that may hold reductions over the model: both run, one is taken."""
    index, operands = values[0].array.astype(jnp.int32), values[1:]
    outs = [_run(branch.jaxpr, branch.consts, operands) for branch in eqn.params["branches"]]
    results = []
    for choice in zip(*outs, strict=True):
        laned = any(v.laned for v in choice)
        lanes = next((v.array.shape[0] for v in choice if v.laned), 0)
        arrays = [
            v.array if v.laned == laned else jnp.broadcast_to(v.array, (lanes, *jnp.shape(v.array))) for v in choice
        ]
        tag = next((v.tag for v in choice if v.tag is not None), None)
        results.append(
            Lanes(jax.lax.select_n(index, *arrays) if len(arrays) <= 2 else jnp.choose(index, arrays), laned, tag)
        )
    return results


def _shape(var: Var) -> tuple[int, ...]:
    return var.aval.shape  # pyright: ignore[reportAttributeAccessIssue]


def _bind(jaxpr: Jaxpr, eqn: JaxprEqn, arrays: Sequence) -> list:
    """Runs one equation of a program."""
    given = [(var, array) for var, array in zip(eqn.invars, arrays, strict=True) if not isinstance(var, Literal)]
    program = jaxpr.replace(
        constvars=[],
        invars=[var for var, _ in given],
        outvars=eqn.outvars,
        eqns=[eqn],
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    return eval_jaxpr(program, (), *(array for _, array in given))


def _place(
    path: tuple, shape: Any, result: Lanes, paths: set[tuple], known: Mapping, layout: Layout
) -> tuple[Any, Rest]:
    """An output, with lanes exactly where a block leaf's output belongs, and how it rests: like the leaf if it has the
    leaf's shape.

    Args:
        path: Of the output.
        shape: Of one lane.
        result: The output.
        paths: Of the block leaves.
        known: All leaves of the pipeline tree by path.
        layout: Where the layers live.
    """
    found = find_path(path, paths)
    if found is not None:
        lanes = _position(found, layout).real.shape
        array = result.array if result.laned else jnp.broadcast_to(result.array, (math.prod(lanes), *shape.shape))
        array = array.reshape(*lanes, *shape.shape)
        alike = array.shape == known[found].shape
        return array, layout.rest(found, array.shape) if alike else block_rest(array.shape, len(lanes), layout.sizes)
    if result.laned:
        raise ConfigError(
            f"the optimizer's state at {jax.tree_util.keystr(path)} depends on layers but is not stored per leaf; "
            "try a transformation whose state has the tree structure of the parameters"
        )
    tag = _end_tag(path)
    alike = tag in known and known[tag].shape == shape.shape
    return result.array, layout.rest(tag, shape.shape) if tag and alike else end_rest(shape.shape, layout.sizes)
