"""Costs as XLA sees them: operations, bytes and temporaries of one block.

Nothing is run. Operations and bytes are of the program for the present devices, temporaries of the one for the devices
that are meant, where XLA can compile for those (`jaxpipe.train.targets`). Times are the operations at the device's
speed, or the bytes at its memory's if that is longer.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from jaxpipe.plan import BlockCost, DeviceSpec, LaneTimes, ModelCosts
from jaxpipe.plan.cost import Remat
from jaxpipe.runtime.carry import join, part
from jaxpipe.runtime.ends import accumulator_dtype
from jaxpipe.runtime.heads import HeadGradients, head_gradients
from jaxpipe.runtime.model import VocabHead
from jaxpipe.runtime.sizes import memory_of, tree_bytes
from jaxpipe.runtime.stage import Stage
from jaxpipe.runtime.tree import get_path
from jaxpipe.train.config import Config
from jaxpipe.train.parts import Parts, parts_of


def compiled_costs(
    config: Config, device: DeviceSpec, rows: int, remats: tuple[Remat, ...], place: Sharding | None = None
) -> ModelCosts:
    """The costs of a run's model for microbatches of `rows` rows on one device.

    Args:
        config: The run.
        device: Whose speed counts.
        rows: Rows of a microbatch.
        remats: What forwards may keep.
        place: Where temporaries are counted, see `jaxpipe.train.targets.place_of`; by default the present devices.
    """
    parts = parts_of(config, rows, remats)

    def seconds(lane: Callable, shapes: tuple) -> float:
        analysis: Any = jax.jit(lane).lower(*shapes).compile().cost_analysis()
        found = analysis[0] if isinstance(analysis, list) else analysis
        operations, moved = found.get("flops", 0.0), found.get("bytes accessed", 0.0)
        dtype = config.model.dtype
        return max(operations / device.flops_per_s(dtype), moved / device.traffic_bytes_per_s)

    times: dict[tuple[str, Remat], LaneTimes] = {
        (kind, remat): LaneTimes(*(seconds(*lane) for lane in lanes(parts.stages[kind, remat, 1]).values()))
        for kind in parts.kinds
        for remat in remats
    }
    forward, backward, head = (seconds(*lane) for lane in end_lanes(_whole_logits(parts)).values())
    return assemble_costs(
        config, parts, remats, times, (forward, backward, head), source="compiled", device=device, place=place
    )


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


def _whole_logits(parts: Parts) -> Parts:
    """The same with a head that has no loop over chunks of tokens, of which XLA would count one."""
    head = parts.model.head_loss
    if not isinstance(head, VocabHead):
        return parts
    tokens = jax.eval_shape(head.targets, parts.mb)[0].size
    return replace(parts, model=replace(parts.model, head_loss=replace(head, chunk=tokens)))


def end_lanes(parts: Parts) -> dict[str, tuple[Callable, tuple]]:
    """Embedding, its gradient, and the head with both of its, with the shapes of their arguments."""
    gradient = part(parts.carry)[0]
    return {
        "embed": (lambda p, mb: parts.model.embed.apply(p, mb, None), (parts.embed, parts.mb)),
        "embed gradient": (partial(embed_gradient, parts), (parts.embed, parts.mb, gradient)),
        "head": (partial(head, parts), (parts.head, parts.carry, parts.mb)),
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


def assemble_costs(
    config: Config,
    parts: Parts,
    remats: tuple[Remat, ...],
    times: dict[tuple[str, Remat], LaneTimes],
    ends: tuple[float, float, float],
    *,
    source: Any,
    device: DeviceSpec,
    place: Sharding | None = None,
) -> ModelCosts:
    """Costs from given times; bytes are what the lanes keep and what XLA allots for them.

    Args:
        config: The run.
        parts: Of its model.
        remats: What forwards may keep.
        times: By kind and remat.
        ends: Seconds of embedding, its gradient and the head.
        source: Where the times are from.
        device: What computes.
        place: Where temporaries are counted.
    """
    blocks, base = {}, 0.0
    for kind in parts.kinds:
        whole, split = {}, {}
        for remat in remats:
            one, two = (working(parts.stages[kind, remat, count], place) for count in (1, 2))
            whole[remat], split[remat] = max(0, two[0] - one[0]), max(0, two[1] - one[1])
            base = max(base, one[0] - whole[remat])
        keeps: dict[Remat, float] = dict.fromkeys(remats, 0.0)
        crossing: dict[Remat, float] = {}
        for remat in remats:
            stage = parts.stages[kind, remat, 1]
            crossing[remat] = tree_bytes(stage.weight_residuals) + (parts.carry_bytes if remat == "full" else 0)
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
    ends_params = sum(leaf.size for leaf in jax.tree.leaves((parts.embed, parts.head)))
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
        head_working_bytes=_temporaries(lane, shapes, place),
        head_chunks=_head_chunks(parts),
        stage_working_bytes=base,
        dtype_bytes=leaves[0].dtype.itemsize,
        param_bytes=jax.dtypes.canonicalize_dtype(config.model.param_dtype).itemsize,
        conditional=device.cores is None,
    )


def working(stage: Stage, place: Sharding | None = None) -> tuple[int, int]:
    """Temporaries of a stage's backward, whole and split."""
    found = lanes(stage)
    whole, inputs, weights = (_temporaries(*found[name], place) for name in ("backward", "input", "weight"))
    return whole, max(inputs, weights)


def _temporaries(lane: Callable, shapes: tuple, place: Sharding | None) -> int:
    placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)
    return memory_of(jax.jit(lane).lower(*placed).compile()).temp_size_in_bytes
