"""A drop-in Linen layer whose blocks run as a pipeline."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import core, linen as nn

from jaxpipe.errors import ConfigError, whole_number
from jaxpipe.nn.layer import check_inputs, make_sweeps, sort_inputs
from jaxpipe.nn.linen_part import LinenPart, call_with_flag
from jaxpipe.runtime.layer.sweeps import Sweeps
from jaxpipe.runtime.layout.mesh import PIPE
from jaxpipe.runtime.model import Tree
from jaxpipe.runtime.stage.stage import Remat
from jaxpipe.schedule import Schedule


class Pipelined(nn.Module):
    """A run of equal blocks, one after the other, pipelined over the mesh axis `pipe`; see `jaxpipe.nn.Pipelined`.

    It is called as ``y = layer(x, *inputs)`` within any Linen module. Its parameters are one entry ``blocks`` of
    "params": the block's own tree with leaves ``[num_layers, ...]``, boxed as `nn.Partitioned` with the logical axis
    "pipe" on the first dim (where the pipe size divides it) before the block's own names.

    Blocks draw from the random streams `streams` where the call has any of them and is not deterministic: for each row
    group and block from a key of its own.

    ``init`` makes the parameters from the first rows of x alone, which need not divide, and returns what the plain loop
    does, without random streams.

    Attributes:
        block: One block, whose output is like its input in structure, shapes and dtypes.
        num_layers: Number of blocks.
        mesh: From `make_mesh`; None: one device.
        schedule: Any schedule with backwards, see `jaxpipe.nn.Pipelined`.
        microbatches: M, where there is no schedule.
        repeats: V, where there is no schedule.
        stages: Blocks per stage, see `Pipeline`.
        remat: What a forward keeps for its backward, see `Pipeline`.
        scan_blocks: Loop over a stage's blocks, see `Pipeline`.
        inputs: What each input beside x is: ``"split"``, ``"constant"`` or ``"shared"``, see `jaxpipe.nn.Pipelined`.
        call: How a block is called: ``(block, x, *inputs, deterministic) -> x``. None: with x and the inputs, and with
            `deterministic`, or turned round `train` or `training`, if its ``__call__`` has such a parameter.
        streams: Names of the blocks' random streams.

    Example:
        >>> layer = Pipelined(block=nn.Dense(4), num_layers=3)
        >>> x = jnp.ones((2, 4))
        >>> variables = layer.init(jax.random.key(0), x)
        >>> layer.apply(variables, x).shape, nn.get_partition_spec(variables)["params"]["blocks"]["kernel"]
        ((2, 4), P('pipe', None, None))
    """

    block: nn.Module
    num_layers: int
    mesh: Any = None
    schedule: Schedule | None = None
    microbatches: int | None = None
    repeats: int = 1
    stages: Sequence[int] | str | None = None
    remat: Remat | Sequence[Remat] = "full"
    scan_blocks: bool = False
    inputs: Sequence[str] = ()
    call: Callable[..., Tree] | None = None
    streams: Sequence[str] = ("dropout",)

    @nn.compact
    def __call__(self, x: Tree, *inputs: Tree, deterministic: bool | None = None) -> Tree:
        """The last block's output.

        Args:
            x: The first block's input: an array ``[B, ...]`` or a tree of them, B a multiple of microbatches times data
                shards.
            inputs: What all blocks read.
            deterministic: Whether blocks run without random streams; by default where the call has none of `streams`.

        Raises:
            ConfigError: A block with another collection than "params", rows that do not divide, or options that do not
                fit.
            PartitionError: The blocks do not divide into stages, or one changes the shape or dtype of x.
        """
        whole_number("num_layers", self.num_layers)
        if isinstance(self.streams, str):
            raise ConfigError(f"streams={self.streams!r} must be a sequence of names; try streams=({self.streams!r},)")
        initial = self.is_initializing()
        # Flax draws from "params" where a stream is not given.
        random = [name for name in (*self.streams, "params") if self.has_rng(name) and not initial]
        deterministic = initial or (not random if deterministic is None else deterministic)
        part = self._part(deterministic)
        sweeps = self._sweeps(part)
        known = sort_inputs(check_inputs(self.inputs), inputs)
        if self.has_variable("params", "blocks"):
            params = core.meta.unbox(self.get_variable("params", "blocks"))
            self._check(params)
        else:
            params = self.param("blocks", lambda key: self._init(part, sweeps, key, x, inputs))
        if initial:
            plain = {"mesh": None, "schedule": None, "microbatches": 1, "repeats": 1, "stages": None, "remat": "none"}
            sweeps = self._sweeps(part, **plain)
        key = None if deterministic or not random else self.make_rng(random[0])
        return sweeps(params, jax.tree.map(jnp.asarray, x), known, key)

    def _part(self, deterministic: bool) -> LinenPart:
        """The block as functions; it is unbound, since it is no submodule of this layer."""
        call = self.call or call_with_flag
        return LinenPart(
            name="block",
            module=self.block.clone(name=None, _deep_clone=True, _reset_names=True),
            make=lambda module, *inputs: call(module, *inputs, deterministic=True),
            call=lambda module, *inputs_and_flag: call(module, *inputs_and_flag[:-1], deterministic=deterministic),
            streams=tuple(self.streams),
            advice=f"try rngs={{{self.streams[0]!r}: key}}, or deterministic=True" if self.streams else "try streams=…",
        )

    def _sweeps(self, part: LinenPart, **options: Any) -> Sweeps:
        """The pipeline, or for a first call, which only makes parameters, the plain loop."""
        options = {
            "mesh": self.mesh,
            "schedule": self.schedule,
            "microbatches": self.microbatches,
            "repeats": self.repeats,
            "stages": self.stages,
            "remat": self.remat,
            "scan_blocks": self.scan_blocks,
        } | options
        return make_sweeps(
            lambda params, x, *inputs, key: part.apply(params, key, x, *inputs), self.num_layers, **options
        )

    def _init(self, part: LinenPart, sweeps: Sweeps, key, x: Tree, inputs: tuple) -> Tree:
        """Stacked parameters in their boxes, made from the rows of one microbatch."""
        rows = max(1, jax.tree.leaves(x)[0].shape[0] // sweeps.row_groups)
        kinds = [*self.inputs, *["split"] * len(inputs)]
        cut = lambda tree: jax.tree.map(lambda leaf: leaf[:rows], tree)  # noqa: E731
        few = [value if kind == "shared" else cut(value) for kind, value in zip(kinds, inputs, strict=False)]
        keys = jnp.stack([jax.random.fold_in(key, number) for number in range(self.num_layers)])
        stacked = jax.vmap(lambda key: part.variables(key, cut(x), *few)["params"])(keys)
        axis = PIPE if self.num_layers % sweeps.mesh.shape[PIPE] == 0 else None

        def box(leaf: Any) -> core.meta.AxisMetadata:
            if isinstance(leaf, core.meta.AxisMetadata):
                return leaf.add_axis(0, {nn.PARTITION_NAME: axis})
            return nn.Partitioned(leaf, names=(axis, *[None] * (leaf.ndim - 1)))

        return jax.tree.map(box, stacked, is_leaf=lambda leaf: isinstance(leaf, core.meta.AxisMetadata))

    def _check(self, params: Tree):
        """Raises for parameters of another number of blocks."""
        for path, leaf in jax.tree.leaves_with_path(params):
            if leaf.shape[:1] != (self.num_layers,):
                raise ConfigError(
                    f"blocks{jax.tree_util.keystr(path)} has shape {list(leaf.shape)} but must start with "
                    f"num_layers={self.num_layers}; try num_layers={leaf.shape[0] if leaf.ndim else 1}"
                )
