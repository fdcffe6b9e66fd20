"""Costs as XLA sees them: operations, bytes and temporaries of one block.

Nothing is run. Lanes are traced and compiled for the device that is meant, where XLA can compile for it
(`jaxpipe.measure.targets`), else for the present one. Operations are those of the matrix products in the trace, bytes
what the compiled program reads and writes. Times are the operations at the device's speed, or the bytes at its
memory's if that is longer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpipe.config.run import Config
from jaxpipe.errors import ConfigError
from jaxpipe.measure.parts import Parts, parts_of
from jaxpipe.plan import BlockCost, DeviceSpec, LaneTimes, ModelCosts
from jaxpipe.plan.cost import Remat
from jaxpipe.runtime.layout.mesh import make_mesh, on_cpu
from jaxpipe.runtime.layout.tree import get_path
from jaxpipe.runtime.loop.lane import PASSES_IN_PLACE
from jaxpipe.runtime.measure.arithmetic import dot_flops
from jaxpipe.runtime.measure.sizes import Share, memory_of, tree_bytes
from jaxpipe.runtime.measure.traffic import accessed_bytes
from jaxpipe.runtime.model import VocabHead
from jaxpipe.runtime.stage.carry import join, part
from jaxpipe.runtime.stage.ends import accumulator_dtype
from jaxpipe.runtime.stage.heads import HeadGradients, head_gradients, head_sums
from jaxpipe.runtime.stage.stage import Stage


def compiled_costs(
    config: Config, device: DeviceSpec, rows: int, remats: tuple[Remat, ...], mesh: Mesh | None = None
) -> ModelCosts:
    """The costs of a run's model for microbatches of `rows` rows on one device.

    Args:
        config: The run.
        device: Whose speed counts.
        rows: Rows of a microbatch.
        remats: What forwards may keep.
        mesh: The device that is compiled for, see `jaxpipe.measure.targets.mesh_of`; by default the present one.

    Raises:
        ConfigError: The model asks for a kernel that this device does not have.
    """
    mesh = make_mesh(pipe=1) if mesh is None else mesh
    if config.model.attention == "cudnn" and on_cpu(mesh):
        raise ConfigError(
            f"model.attention='cudnn' cannot be compiled for device={device.name!r}, only for NVIDIA GPUs; try "
            "model.attention='auto'"
        )
    parts = parts_of(config, rows, remats, mesh=mesh).traced()

    def seconds(lane: Callable, shapes: tuple, adds: bool = False) -> float:
        operations = dot_flops(parts.share.body(lane), *shapes)
        moved = accessed_bytes(parts.share.compiled(lane, shapes, adds=adds).as_text())
        return max(operations / device.flops_per_s(config.model.dtype), moved / device.traffic_bytes_per_s)

    times: dict[tuple[str, Remat], LaneTimes] = {
        (kind, remat): LaneTimes(*(seconds(*lane) for lane in lanes(parts.stages[kind, remat, 1]).values()))
        for kind in parts.kinds
        for remat in remats
    }
    forward, backward, head = (seconds(*lane, adds=name == "head") for name, lane in end_lanes(parts).items())
    return assemble_costs(config, parts, remats, times, (forward, backward, head), source="compiled", device=device)


def lanes(stage: Stage) -> dict[str, tuple[Callable, tuple]]:
    """The lane functions of a stage with the shapes of their arguments, in the order of `LaneTimes`."""
    return {
        "forward": (stage.forward, (stage.params, stage.carry, stage.context)),
        "input": (stage.backward_input, stage.backward_shapes),
        "weight": (stage.backward_weight, stage.backward_weight_shapes),
        "backward": (stage.backward, stage.backward_shapes),
    }


def _head_chunks(parts: Parts) -> int:
    head = parts.model.head_loss
    if not isinstance(head, VocabHead):
        return 1
    return head.chunks(jax.eval_shape(head.targets, parts.mb)[0].size, get_path(parts.head, head.kernel).shape[0])


def end_lanes(parts: Parts) -> dict[str, tuple[Callable, tuple]]:
    """Embedding, its gradient, and the head with both of its, with the shapes of their arguments.

    The head's first argument is the sum that the gradient of its parameters is added to.
    """
    gradient = part(parts.carry)[0]
    return {
        "embed": (lambda p, mb: parts.model.embed.apply(p, mb, None), (parts.embed, parts.mb)),
        "embed gradient": (partial(embed_gradient, parts), (parts.embed, parts.mb, gradient)),
        "head": (partial(_head_added, parts), (head_sums(parts.head), parts.head, parts.carry, parts.mb)),
    }


def embed_gradient(parts: Parts, params: Any, mb: Any, dx: Any) -> Any:
    """The gradient of the embedding's parameters."""
    _, vjp = jax.vjp(lambda p: part(parts.model.embed.apply(p, mb, None))[0], params)
    return vjp(dx)[0]


def head(parts: Parts, params: Any, carry: Any, mb: Any, sums: Any = None) -> HeadGradients:
    """The loss of a microbatch and the gradients of the head's parameters, added to `sums`, and input."""
    floating, others = part(carry)
    joined = partial(join, carry, others=others)
    seed = jnp.ones((), accumulator_dtype(floating[0].dtype))
    return head_gradients(parts.model.head_loss, params, floating, joined, mb, None, seed, sums)


def _head_added(parts: Parts, sums: Any, params: Any, carry: Any, mb: Any) -> HeadGradients:
    return head(parts, params, carry, mb, sums)


def assemble_costs(
    config: Config,
    parts: Parts,
    remats: tuple[Remat, ...],
    times: dict[tuple[str, Remat], LaneTimes],
    ends: tuple[float, float, float],
    *,
    source: Any,
    device: DeviceSpec,
) -> ModelCosts:
    """Costs from given times; bytes are what the lanes keep and what XLA allots for them.

    Args:
        config: The run.
        parts: Of its model, traced.
        remats: What forwards may keep.
        times: By kind and remat.
        ends: Seconds of embedding, its gradient and the head.
        source: Where the times are from.
        device: What computes.
    """
    conditional = device.cores is None
    blocks, base = {}, 0.0
    for kind in parts.kinds:
        whole, split = {}, {}
        for remat in remats:
            one, two = (working(parts.share, parts.stages[kind, remat, count], conditional) for count in (1, 2))
            whole[remat], split[remat] = max(0, two[0] - one[0]), max(0, two[1] - one[1])
            base = max(base, one[0] - whole[remat])
        keeps: dict[Remat, float] = dict.fromkeys(remats, 0.0)
        crossing: dict[Remat, float] = {}
        for remat in remats:
            stage = parts.stages[kind, remat, 1]
            # The gradient that arrives counts once per stage. With "full" inputs of blocks cross too, but the first's.
            crossing[remat] = tree_bytes(stage.weight_residuals) - (parts.carry_bytes if remat != "full" else 0)
            if remat != "full":
                keeps[remat] = tree_bytes(stage.residuals) + parts.carry_bytes
        blocks[kind] = BlockCost(
            times={remat: times[kind, remat] for remat in remats},
            residual_bytes=keeps,
            weight_residual_bytes=crossing,
            working_bytes=whole,
            split_working_bytes=split,
            params=parts.params[kind],
        )
    (lane, shapes) = end_lanes(parts)["head"]
    allotted = memory_of(parts.share.compiled(lane, shapes, adds=True))
    # What it gives back is on its way, and counts there.
    given_back = allotted.output_size_in_bytes - allotted.alias_size_in_bytes
    head_bytes = allotted.temp_size_in_bytes + max(0, given_back - parts.carry_bytes)
    embed_params = sum(leaf.size for leaf in jax.tree.leaves(parts.embed))
    ends_params = embed_params + sum(leaf.size for leaf in jax.tree.leaves(parts.head))
    if config.model.tied:
        ends_params -= config.model.vocab_size * config.model.d_model
    leaves = jax.tree.leaves(parts.carry)
    return ModelCosts(
        source=source,
        rows=parts.rows,
        tensor=1,
        blocks=blocks,
        embed_forward_s=ends[0],
        embed_backward_s=ends[1],
        head_s=ends[2],
        carry_bytes=parts.carry_bytes,
        ends_params=ends_params,
        head_working_bytes=head_bytes,
        head_chunks=_head_chunks(parts),
        passes_in_place=PASSES_IN_PLACE,
        stage_working_bytes=base,
        dtype_bytes=leaves[0].dtype.itemsize,
        param_bytes=jax.dtypes.canonicalize_dtype(config.model.param_dtype).itemsize,
        conditional=conditional,
        embed_params=embed_params,
    )


def working(share: Share, stage: Stage, conditional: bool) -> tuple[int, int]:
    """Temporaries of a stage's backward, whole and split, beside what it gives back: see `BlockCost`."""
    found = lanes(stage)
    whole, inputs, weights = (
        memory_of(share.compiled(*found[name])).temp_size_in_bytes for name in ("backward", "input", "weight")
    )
    if not conditional:
        return whole, max(inputs, weights)
    left, made = tree_bytes(stage.weight_residuals), tree_bytes(stage.params["blocks"])
    return whole, max(inputs + left, weights + made) - max(left, made)
