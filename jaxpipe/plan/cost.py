"""What the parts of a model cost on one device for one microbatch: times, and bytes that are kept.

`ModelCosts` has three sources and is the same value from each:

    analytic   counted here, from a `ModelShape` and a `DeviceSpec`
    compiled   the operations and bytes that XLA finds in one block (`jaxpipe.measure.compiled`)
    measured   one block of each kind timed on a device (`jaxpipe.measure.profiling`)

The analytic time of a part is the sum of three: its matrix products at `DeviceSpec.flops_per_s`, or the time to read
and write their operands if that is longer; its elementwise work at the memory's bandwidth; and, where `tensor` devices
share it, their collectives, which nothing overlaps.

Legend: D width, F hidden dims of the MLP, n tokens of a microbatch, t devices on the tensor axis.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from jaxpipe.plan.device import DeviceSpec
from jaxpipe.plan.links import all_reduce_s, gather_s
from jaxpipe.plan.shape import DTYPE_BYTES, Attention, BlockShape, ModelShape

Remat = Literal["full", "none", "all"]

REMATS: tuple[Remat, ...] = ("none", "full", "all")
"""What forwards may keep for backwards, see `Pipeline`; the order in which equals are preferred."""

Source = Literal["analytic", "compiled", "measured"]


@dataclass(frozen=True)
class LaneTimes:
    """Seconds of one block and one microbatch, with what `remat` computes again.

    Attributes:
        forward: F.
        input: I.
        weight: W.
        backward: B, whole; measured it is less than I and W together.
    """

    forward: float
    input: float
    weight: float
    backward: float


@dataclass(frozen=True)
class BlockCost:
    """One kind of block.

    Attributes:
        times: By remat.
        residual_bytes: What a forward keeps for its backward, by remat; the block's input included where it is kept.
        weight_residual_bytes: What I leaves for W beside that, by remat; the gradient that arrives at a stage, which it
            leaves too, not included.
        working_bytes: Temporaries that one more block adds to a stage's backward beside its weight gradients, by
            remat.
        split_working_bytes: The same where the backward is split: beside the larger of weight gradients and what I
            leaves, for I is done when W begins.
        params: Parameters on this device.
    """

    times: Mapping[Remat, LaneTimes]
    residual_bytes: Mapping[Remat, float]
    weight_residual_bytes: Mapping[Remat, float]
    working_bytes: Mapping[Remat, float]
    split_working_bytes: Mapping[Remat, float]
    params: float


@dataclass(frozen=True)
class ModelCosts:
    """A model's parts on one device, for microbatches of `rows` rows.

    Attributes:
        source: Where the numbers are from.
        rows: Rows of a microbatch.
        tensor: Devices that share every product.
        blocks: By kind.
        embed_forward_s: Embedding of one microbatch.
        embed_backward_s: Its gradient.
        head_s: Logits, loss and both gradients of one microbatch; they run behind the last stage's forward.
        carry_bytes: What hops.
        ends_params: Parameters of embedding and head together, on this device once gathered.
        embed_params: Those of the embedding, which are gathered in the dtype they have at rest: gradients of repeated
            tokens add up in it.
        head_working_bytes: Temporaries of the head, of one chunk of its logits.
        stage_working_bytes: Temporaries of a stage's backward, beside those of its blocks.
        dtype_bytes: Of the computation.
        param_bytes: Of a parameter at rest.
        tick_s: What a tick takes besides its lanes.
        hop_s: Seconds of a hop of `carry_bytes`, where it was measured; None: by the device's links.
        alone: How many times as fast a lane is while no other device computes, where devices share cores.
        conditional: Whether lanes are conditionals, as everywhere but on CPU devices (`jaxpipe.runtime.loop.lane`).
        head_chunks: In how many chunks the logits of a microbatch are computed.
        passes_in_place: Whether XLA passes buffers through every branch of a conditional without a copy, not only
            through the first.
    """

    source: Source
    rows: int
    tensor: int
    blocks: Mapping[str, BlockCost]
    embed_forward_s: float
    embed_backward_s: float
    head_s: float
    carry_bytes: float
    ends_params: float
    head_working_bytes: float
    stage_working_bytes: float
    dtype_bytes: int
    param_bytes: int
    tick_s: float = 0.0
    hop_s: float | None = None
    alone: float = 1.0
    conditional: bool = field(default=True)
    embed_params: float = 0.0
    head_chunks: int = 1
    passes_in_place: bool = True


def analytic(shape: ModelShape, device: DeviceSpec, *, rows: int, tensor: int = 1) -> ModelCosts:
    """Costs by formula.

    Args:
        shape: The model.
        device: What computes.
        rows: Rows of a microbatch.
        tensor: Devices that share every product.

    Raises:
        ConfigError: The device has no peak for the model's dtype.
    """
    size = shape.dtype_bytes
    carry = rows * shape.carry_tokens * shape.width * size
    blocks = {kind: _block(block, shape, device, rows, tensor) for kind, block in shape.blocks.items()}
    moved = rows * shape.carry_tokens * shape.width
    wide = max(4, size)
    chunks = shape.head_chunks(rows, tensor)
    logits = rows * shape.head_tokens * shape.vocab / tensor
    reduced = 2 * all_reduce_s(carry, tensor, 1, device)
    return ModelCosts(
        source="analytic",
        rows=rows,
        tensor=tensor,
        blocks=blocks,
        embed_forward_s=moved * (shape.param_bytes + size) / device.traffic_bytes_per_s,
        embed_backward_s=moved * (3 * wide + size) / device.traffic_bytes_per_s,
        head_s=_head_s(shape, device, rows, tensor) + reduced,
        carry_bytes=carry,
        ends_params=(shape.embed_params + shape.head_params) / tensor,
        # [1] Of a chunk: its logits, and their gradient in the compute dtype; so XLA allots them for H100s.
        head_working_bytes=(wide + size) * logits / chunks,
        stage_working_bytes=6 * carry,
        dtype_bytes=size,
        param_bytes=shape.param_bytes,
        conditional=device.cores is None,
        embed_params=shape.embed_params / tensor,
        head_chunks=chunks,
    )


def _head_s(shape: ModelShape, device: DeviceSpec, rows: int, tensor: int) -> float:
    """Seconds of logits, losses and both gradients: three products, each of all chunks, and elementwise work."""
    size, wide = shape.dtype_bytes, max(4, shape.dtype_bytes)
    logits = rows * shape.head_tokens * shape.vocab / tensor
    kernel = shape.head_chunks(rows, tensor) * shape.vocab * shape.width / tensor
    # [1] Each product reads the kernel or, the last, reads and writes its gradient's sum, once per chunk.
    moved = kernel * size + logits * wide, kernel * size + logits * size, 2 * kernel * wide + logits * size
    product = rows * shape.head_flops / tensor / device.flops_per_s(shape.dtype)
    products = sum(max(product, each / device.traffic_bytes_per_s) for each in moved)
    # [2] Logits are read for their maximum, for their sum, and for their gradient, which is written.
    return products + (3 * wide + size) * logits / device.traffic_bytes_per_s


def _block(block: BlockShape, shape: ModelShape, device: DeviceSpec, rows: int, tensor: int) -> BlockCost:
    size, wide = shape.dtype_bytes, max(4, shape.dtype_bytes)
    params = block.params / tensor
    linear = rows * block.linear_flops / tensor / device.flops_per_s(shape.dtype)
    score = rows * block.score_flops / tensor / device.flops_per_s(shape.dtype)
    traffic = rows * _traffic_bytes(block, size, tensor)
    operands = params * size + rows * _product_numbers(block, tensor) * size
    carry = rows * block.tokens * block.width * size
    reduced = (len(block.attentions) + 1) * all_reduce_s(carry, tensor, 1, device)
    bandwidth = device.traffic_bytes_per_s
    gathering = [a for a in block.attentions if a.gathers(tensor)]
    gathered = sum(gather_s(rows * a.projected * size, tensor, 1, device) for a in gathering)
    returned = sum(_returned_s(a, rows * size, tensor, device) for a in gathering)
    forward = max(linear + score, operands / bandwidth) + traffic / bandwidth + reduced + gathered
    # [1] Of the elementwise work all is done again for the input gradient, which reads and writes twice as much.
    inputs = max(linear + 2 * score, operands / bandwidth) + 2 * traffic / bandwidth + reduced + returned
    # [2] Weight gradients are written, read, and added to an accumulator.
    accumulator = params * (2 * size + 2 * max(4, shape.param_bytes))
    weights = max(linear, operands / bandwidth) + accumulator / bandwidth
    # [3] Norms of queries and keys need what was gathered both ways in W too.
    normed = gathered + returned if any(a.norm_params for a in gathering) else 0.0
    again: dict[Remat, float] = {"full": forward, "none": traffic / bandwidth + gathered, "all": 0.0}
    times: dict[Remat, LaneTimes] = {
        r: LaneTimes(forward, inputs + more, weights + normed, inputs + more + weights) for r, more in again.items()
    }
    keeps = rows * _kept_bytes(block, size, wide, tensor)
    everything = rows * _all_bytes(block, size, wide, tensor)
    gradients = rows * _crossing_bytes(block, size, wide, tensor)
    inputs_again = rows * _crossing_again_bytes(block, size, tensor)
    crossing: dict[Remat, float] = {"full": gradients + inputs_again, "none": gradients, "all": gradients}
    unit, scores = rows * block.tokens * block.width * size, rows * _scores(block) * wide / tensor
    # [4] What XLA allots for blocks of several shapes, rounded. Of 17 such units that a backward needs, tensor
    # parallelism leaves 5 whole (Korthikanti et al., 2022, equation 2, without the scores).
    unit *= (5 + 12 / tensor) / 17
    temporaries: dict[Remat, tuple[int, int, int]] = {"full": (18, 10, 2), "none": (13, 6, 2), "all": (10, 6, 1)}
    whole: dict[Remat, float] = {r: n * unit + times * scores for r, (n, _, times) in temporaries.items()}
    split: dict[Remat, float] = {r: n * unit + times * scores for r, (_, n, times) in temporaries.items()}
    if device.cores is None:
        # [5] What a conditional gives back has memory of its own from its start, in which XLA puts temporaries before.
        made = params * min(size, shape.param_bytes)
        for remat in crossing:
            whole[remat] = max(0.0, whole[remat] - made)
            split[remat] = max(0.0, split[remat] - max(made, crossing[remat]))
    return BlockCost(
        times=times,
        residual_bytes={"full": 0.0, "none": keeps, "all": everything},
        weight_residual_bytes=crossing,
        working_bytes=whole,
        split_working_bytes=split,
        params=params,
    )


def _returned_s(attention: Attention, bytes_each: float, tensor: int, device: DeviceSpec) -> float:
    """Seconds until every device has the gradients of all queries, keys and values where all had the latter two."""
    queries, keys = (n * bytes_each for n in (attention.queries * attention.inner, attention.keys * attention.kv_inner))
    return gather_s(queries, tensor, 1, device) + all_reduce_s(2 * keys, tensor, 1, device)


def _scores(block: BlockShape) -> int:
    return sum(a.scores for a in block.attentions if not a.fused)


def _traffic_bytes(block: BlockShape, size: int, tensor: int) -> float:
    """What the elementwise work of a forward reads and writes, per row."""
    norms = (len(block.attentions) + 1) * block.tokens * block.width * 2 * size
    residuals = (len(block.attentions) + 1) * block.tokens * block.width * 3 * size
    heads = sum(
        2 * size * (a.own_projected(tensor) + (a.projected if a.gathers(tensor) else 0))  # gathered, then taken apart
        + (4 * size * a.own_rotatable(tensor) if a.rotary else 0)
        for a in block.attentions
    )
    softmax = 4 * size * _scores(block)
    hidden = block.mlp_tokens * block.mlp.hidden * 2 * size * (block.mlp.matrices - 1)
    moved = 4 * size * (block.tokens + block.mlp.places) * block.width if block.mlp.experts else 0
    return norms + residuals + heads + (softmax + hidden + moved) / tensor


def _product_numbers(block: BlockShape, tensor: int) -> float:
    """Numbers that the products with weights read and write, per row."""
    attention = sum(
        2 * (a.queries + a.keys) * block.width + (a.projected + a.queries * a.inner) / tensor for a in block.attentions
    )
    mlp = block.mlp_tokens * block.mlp.matrices * (block.width + block.mlp.hidden / tensor)
    return attention + mlp


def _kept_bytes(block: BlockShape, size: int, wide: int, tensor: int) -> float:
    """What ``remat="none"`` keeps, per row: the block's input and the results of its products.

    The last product's result is not among them: it is part of the next block's input.
    """
    inputs = block.tokens * block.width
    attention = sum((a.projected + a.queries * a.inner) / tensor + a.queries * block.width for a in block.attentions)
    mlp = block.mlp_tokens * block.mlp.hidden * (block.mlp.matrices - 1) / tensor
    mixture = 2 * block.mlp.places * block.width if block.mlp.experts else 0
    return size * (inputs + attention + mlp + mixture) + wide * _scores(block) / tensor


def _all_bytes(block: BlockShape, size: int, wide: int, tensor: int) -> float:
    """What ``remat="all"`` keeps, per row: every value that the backward reads."""
    norms = (len(block.attentions) + 1) * block.tokens * block.width * (2 * wide + size)
    attention = sum(2 * a.own_projected(tensor) * size for a in block.attentions)
    hidden = block.mlp_tokens * block.mlp.hidden * 5 * size / tensor
    return norms + attention + hidden + 2 * wide * _scores(block) / tensor + _kept_bytes(block, size, wide, tensor) / 2


def _crossing_bytes(block: BlockShape, size: int, wide: int, tensor: int) -> float:
    """What I leaves for W: gradients that the backward's products and kernels made, per row.

    Those of queries, keys and values; of the MLP's hidden numbers, from which elementwise work goes on to the matrices
    before; and of what each of the first matrices behind a norm is given.
    """
    attention = sum(size * (a.projected / tensor + a.queries * block.width) for a in block.attentions)
    # Gathered ones are handed on as the product's columns; else they are kernels' or wide products' results.
    attention += sum(
        a.rotatable / tensor * (wide - size) for a in block.attentions if not (a.fused or a.gathers(tensor))
    )
    attention += sum(size * a.own_rotatable(tensor) for a in block.attentions if a.gathers(tensor) and a.norm_params)
    given = block.mlp_tokens * block.width * (block.mlp.matrices - 1)
    return attention + size * (block.mlp_tokens * block.mlp.hidden / tensor + given)


def _crossing_again_bytes(block: BlockShape, size: int, tensor: int) -> float:
    """What W needs of the forward that ran again: inputs of the products."""
    attention = sum(a.queries * a.inner / tensor + block.tokens * block.width for a in block.attentions)
    mlp = block.mlp_tokens * block.mlp.hidden * (block.mlp.matrices - 1) / tensor
    return size * (attention + mlp + block.tokens * block.width)


def accumulator_bytes(costs: ModelCosts) -> int:
    """Bytes of a gradient sum: float32 or wider."""
    return max(DTYPE_BYTES["float32"], costs.param_bytes)
