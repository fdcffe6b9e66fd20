"""One block of each kind, the embedding and the head as the compiled loop runs them: lane functions and their shapes.

What `jaxpipe.measure.compiled` asks XLA about, and what `jaxpipe.measure.profiling` times.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpipe.config.run import Config
from jaxpipe.models.build import gpt_model
from jaxpipe.plan.cost import REMATS, Remat
from jaxpipe.runtime.layout.mesh import make_mesh
from jaxpipe.runtime.measure.sizes import Share, tree_bytes
from jaxpipe.runtime.model import Model
from jaxpipe.runtime.pipeline import Pipeline
from jaxpipe.runtime.stage.stage import Stage
from jaxpipe.schedule import build


@dataclass(frozen=True)
class Parts:
    """The lane functions of a model for microbatches of one size.

    Attributes:
        model: The model.
        share: The device that they are for.
        rows: Rows of a microbatch.
        stages: By kind, remat and number of blocks, a stage of so many blocks.
        embed: Shapes of the embedding's parameters.
        head: Shapes of the head's parameters, tied leaves included.
        carry: Shapes of what hops.
        mb: Shapes of a microbatch.
        params: By kind, parameters of a block.
    """

    model: Model
    share: Share
    rows: int
    stages: dict[tuple[str, Remat, int], Stage]
    embed: Any
    head: Any
    carry: Any
    mb: Any
    params: dict[str, int]

    @property
    def kinds(self) -> list[str]:
        """The kinds of block."""
        return list(self.params)

    def traced(self) -> "Parts":
        """The same, with what stages keep traced for the device that is meant; they cannot run in another mesh then."""
        self.share.trace([*self.stages.values()])
        return self

    @property
    def carry_bytes(self) -> int:
        """Bytes that hop."""
        return tree_bytes(self.carry)


def parts_of(
    config: Config, rows: int, remats: tuple[Remat, ...] = REMATS, deepest: int = 2, mesh: Mesh | None = None
) -> Parts:
    """The parts of a run's model.

    Args:
        config: The run.
        rows: Rows of a microbatch.
        remats: What forwards keep.
        deepest: Stages of 1, 2, … so many blocks are made.
        mesh: One device of the kind that is meant, which need not be there. None: the present one.
    """
    mesh = make_mesh(pipe=1) if mesh is None else mesh
    model, shape = gpt_model(config.model), (rows, config.train.seq_len)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("tokens", "targets")}
    first = {block.kind: block for block in reversed(model.blocks)}
    stages: dict[tuple[str, Remat, int], Stage] = {}
    program = None
    for kind, block in first.items():
        for remat in remats:
            for count in range(1, deepest + 1):
                program = _program(replace(model, blocks=[block] * count), batch, remat, mesh)
                stages[kind, remat, count] = program.stages.stage
    assert program is not None
    params = {kind: _size(stages[kind, remats[0], 1].params["blocks"]) for kind in first}
    ends = program.ends
    shapes = jax.eval_shape(ends.head, dict(ends.shapes))
    return Parts(
        model, Share.of(mesh), rows, stages, ends.shapes["embed"], shapes, program.stages.stage.carry, batch, params
    )


def _program(model: Model, batch: Any, remat: Remat, mesh: Mesh):
    pipe = Pipeline(model, schedule=build("1f1b", devices=1, microbatches=1), mesh=mesh, remat=remat)
    params = jax.eval_shape(pipe.init, jax.eval_shape(lambda: jax.random.key(0)), batch)
    return pipe.program(params, batch)


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def arrays(shapes: Any, seed: int = 0) -> Any:
    """Small random numbers of given shapes; integers are 0."""
    rng = np.random.default_rng(seed)

    def one(s):
        if jnp.issubdtype(s.dtype, jnp.floating):
            return jnp.asarray(0.02 * rng.standard_normal(s.shape, np.float32), s.dtype)
        return jnp.zeros(s.shape, s.dtype)

    return jax.tree.map(one, shapes)
