"""A drop-in NNX layer whose blocks run as a pipeline: `Pipelined`."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxpipe.errors import ConfigError, one_of_type, whole_number
from jaxpipe.flax_nnx import nnx
from jaxpipe.jax_internals import Tracer
from jaxpipe.nn.layer import check_inputs, make_sweeps, sort_inputs
from jaxpipe.nn.nnx_part import Factory, NNXPart
from jaxpipe.runtime.layout.mesh import PIPE
from jaxpipe.runtime.model import Tree
from jaxpipe.runtime.stage.stage import Remat
from jaxpipe.schedule import Schedule


def _call(block: Any, x: Tree, *inputs: Tree) -> Tree:
    return block(x, *inputs)


class Pipelined(nnx.Module):
    """A run of equal blocks, one after the other, pipelined over the mesh axis `pipe`.

    It is called as ``y = layer(x, *inputs)`` anywhere in a larger model and differentiated like any other layer. Its
    gradient is a pipeline of its own, with explicit vjps of the stages. All forwards come before all backwards, since
    the loss is outside: with ``remat="full"`` one block input per stage and microbatch is kept. `nnx_model` with
    `Pipeline` has the loss inside, and 1F1B's memory.

    Parameters keep their names and types below ``blocks``, stacked ``[num_layers, ...]``, with the logical axis "pipe"
    on the first dim (where the pipe size divides it). Block i starts from the layer's ``params`` stream, folded with i.

    Random streams in the blocks (dropout) start anew at each call, for each row group and block, from the layer's own
    stream ``rngs``. After ``eval()``, or with ``deterministic=True``, there are none.

    On one device it is the plain loop over the blocks.

    Args:
        block: Factory of one block: ``rngs -> module``. Its output is like its input in structure, shapes and dtypes.
        num_layers: Number of blocks.
        mesh: From `make_mesh`; None: one device.
        schedule: Any schedule with backwards, whose `devices` is the mesh's `pipe` size: its forwards run first, then
            its backwards, each in their order. By default `gpipe`, or `circular` for ``repeats > 1``.
        microbatches: M, where there is no schedule. By default 1 on one device.
        repeats: V, where there is no schedule.
        stages: Blocks per stage, see `Pipeline`; by default the same number for all.
        remat: What a forward keeps for its backward, see `Pipeline`.
        scan_blocks: Loop over a stage's blocks instead of unrolling them, see `Pipeline`.
        inputs: For each input beside x what it is: ``"split"`` has the rows of x first and gets a gradient (its
            floating-point leaves hop along with x); ``"constant"`` is split too but gets none, and does not hop: masks;
            ``"shared"`` is the same for all rows. By default all are ``"split"``.
        call: How a block is called: ``(block, x, *inputs) -> x``.
        rngs: Random streams: ``params``, and ``dropout`` if the blocks have random streams.

    Raises:
        ConfigError: Blocks with state that is neither `nnx.Param` nor a random stream, or options that do not fit.
        PartitionError: The blocks do not divide into stages.

    Example:
        >>> layer = Pipelined(lambda rngs: nnx.Linear(4, 4, rngs=rngs), num_layers=3, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 4))).shape, layer.blocks["kernel"].shape
        ((2, 4), (3, 4, 4))
    """

    def __init__(
        self,
        block: Factory,
        *,
        num_layers: int,
        mesh: Any = None,
        schedule: Schedule | None = None,
        microbatches: int | None = None,
        repeats: int = 1,
        stages: Sequence[int] | str | None = None,
        remat: Remat | Sequence[Remat] = "full",
        scan_blocks: bool = False,
        inputs: Sequence[str] = (),
        call: Callable[..., Tree] = _call,
        rngs: nnx.Rngs,
    ):
        num_layers = whole_number("num_layers", num_layers)
        one_of_type("rngs", rngs, nnx.Rngs, "nnx.Rngs(0)", ConfigError)
        if isinstance(block, nnx.Module):
            raise ConfigError(
                f"block is a {type(block).__name__} but must be a factory, for every block has parameters of its own; "
                "try lambda rngs: …"
            )
        part = NNXPart("block", block, call)
        self.part = part
        self.inputs = check_inputs(inputs)
        self.sweeps = make_sweeps(
            lambda params, x, *inputs, key: part.apply(params, key, x, *inputs),
            num_layers,
            mesh=mesh,
            schedule=schedule,
            microbatches=microbatches,
            repeats=repeats,
            stages=stages,
            remat=remat,
            scan_blocks=scan_blocks,
        )
        self.deterministic = False
        key = rngs.params()
        keys = jnp.stack([jax.random.fold_in(key, number) for number in range(num_layers)])
        self.blocks = self._variables(jax.vmap(part.init)(keys))
        self.rngs: Any = rngs["dropout"].fork() if part.streams else nnx.data(None)

    def __call__(self, x: Tree, *inputs: Tree, deterministic: bool | None = None) -> Tree:
        """The last block's output.

        Args:
            x: The first block's input: an array ``[B, ...]`` or a tree of them, B a multiple of microbatches times data
                shards.
            inputs: What all blocks read, see the class.
            deterministic: Whether blocks run without random streams; by default what `train` and `eval` set.

        Raises:
            ConfigError: Rows that do not divide, or an input with other rows than x.
            PartitionError: A block changes the shape or dtype of x.
        """
        deterministic = self.deterministic if deterministic is None else deterministic
        key = self.rngs() if self.part.streams and not deterministic else None
        known = sort_inputs(self.inputs, inputs)
        return self.sweeps(self._params(), jax.tree.map(jnp.asarray, x), known, key)

    def unstacked(self) -> list[nnx.Module]:
        """The blocks as separate modules of the user's class, with copies of their parameters."""
        modules = []
        for number in range(self.sweeps.num_layers):
            module = self.part.factory(nnx.Rngs(number))
            own = [(path, v.replace(_at(self.blocks, path).get_value()[number])) for path, v in self.part.params]
            nnx.update(module, nnx.from_flat_state(own))
            modules.append(module)
        return modules

    def _variables(self, stacked: dict) -> nnx.Dict:
        """Stacked parameters as variables of the types that the block gave them."""
        mesh, tree = self.sweeps.mesh, nnx.Dict()
        even = self.sweeps.num_layers % mesh.shape[PIPE] == 0
        axis = PIPE if even else None
        for path, variable in self.part.params:
            value = _at(stacked, path)
            if even and mesh.size > 1 and not isinstance(value, Tracer):
                value = jax.device_put(value, NamedSharding(mesh, PartitionSpec(PIPE)))
            names = variable.get_metadata().get("out_sharding") or (None,) * (value.ndim - 1)
            with nnx.use_eager_sharding(False):
                stacked_variable = variable.replace(value, out_sharding=(axis, *names))
            *parents, leaf = map(str, path)
            node: Any = tree
            for parent in parents:
                if parent not in node:
                    node[parent] = nnx.Dict()
                node = node[parent]
            node[leaf] = stacked_variable
        return tree

    def _params(self) -> dict[str, Any]:
        """The stacked parameters as nested dicts."""

        def plain(node: Any) -> Any:
            if isinstance(node, nnx.Variable):
                return node.get_value()
            return {name: plain(value) for name, value in node.items()}

        return plain(self.blocks)


def _at(tree: Any, path: tuple) -> Any:
    """What is at a path of nested dicts."""
    return reduce(lambda node, name: node[str(name)], path, tree)
