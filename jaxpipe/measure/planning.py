"""Where runs meet the planner: a config becomes a question, and a plan becomes a config."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxpipe.config.run import Config
from jaxpipe.config.sections import MeshConfig
from jaxpipe.errors import ConfigError, PartitionError
from jaxpipe.models.encdec_config import EncDecConfig, num_params as encdec_params
from jaxpipe.models.gpt_config import GPTConfig
from jaxpipe.ops.attention_choice import choose
from jaxpipe.ops.losses import LOGITS_AT_ONCE
from jaxpipe.plan import (
    Answer,
    Attention,
    BlockShape,
    DeviceSpec,
    Mlp,
    ModelCosts,
    ModelShape,
    Plan,
    Problem,
    Space,
    analytic,
    find_device,
    search,
)
from jaxpipe.plan.device import num_cores
from jaxpipe.plan.price import SPLIT
from jaxpipe.plan.problem import SCHEDULES
from jaxpipe.runtime.loop.lane import PASSES_IN_PLACE
from jaxpipe.schedule.stages import parse_stages

Costing = Callable[[int, int], ModelCosts]
"""``(rows, tensor) -> costs``."""


def gpt_shape(cfg: GPTConfig, seq_len: int, capability: float | None = None) -> ModelShape:
    """A GPT as the planner sees it.

    Args:
        cfg: The model.
        seq_len: T.
        capability: Of the devices, see `DeviceSpec`.

    Example:
        >>> from jaxpipe.models.gpt import PRESETS, num_params
        >>> gpt_shape(PRESETS["tiny"], 128).params == num_params(PRESETS["tiny"])
        True
    """
    norm = 1 + cfg.bias if cfg.norm == "layernorm" else 1
    chosen = cfg.attention_for(seq_len, capability)
    attention = Attention(
        queries=seq_len,
        keys=seq_len,
        heads=cfg.num_heads,
        head_dim=cfg.head_dim,
        fused=chosen.name != "xla",
        rotary=cfg.positions == "rotary",
        shared=cfg.num_heads // cfg.kv_heads,
        qkv_bias=cfg.qkv_bias,
        norm_params=2 * cfg.head_dim * cfg.qk_norm,
    )
    dense = Mlp(hidden=cfg.hidden_dim, gated=cfg.mlp == "swiglu")
    mixture = replace(
        dense,
        experts=cfg.num_experts,
        places=cfg.num_experts * cfg.expert_capacity(seq_len) if cfg.num_experts else 0,
    )
    blocks = {
        kind: BlockShape(
            kind=kind,
            width=cfg.d_model,
            tokens=seq_len,
            attentions=(attention,),
            mlp=mixture if kind == "moe" else dense,
            bias=cfg.bias,
            norm_params=norm,
        )
        for kind in dict.fromkeys(cfg.kinds)
    }
    positions = cfg.max_seq_len if cfg.positions == "learned" else 0
    return ModelShape(
        kinds=cfg.kinds,
        blocks=blocks,
        width=cfg.d_model,
        vocab=cfg.vocab_size,
        carry_tokens=seq_len,
        head_tokens=seq_len,
        seq_len=seq_len,
        embed_params=(cfg.vocab_size + positions) * cfg.d_model,
        head_params=norm * cfg.d_model + (0 if cfg.tied else cfg.vocab_size * cfg.d_model),
        tied=cfg.tied,
        dtype=cfg.dtype,
        param_dtype=cfg.param_dtype,
        fields={"seq_len": seq_len, **dataclasses.asdict(cfg)},
        logits_at_once=LOGITS_AT_ONCE,
        attention=str(chosen),
    )


def encdec_shape(cfg: EncDecConfig, source_len: int, target_len: int, capability: float | None = None) -> ModelShape:
    """An encoder-decoder as the planner sees it. Both streams hop, so every carry holds both.

    Args:
        cfg: The model.
        source_len: Tokens of the encoder's side.
        target_len: Tokens of the decoder's side.
        capability: Of the devices, see `DeviceSpec`.

    Example:
        >>> from jaxpipe.models.encdec import PRESETS, num_params
        >>> shape = encdec_shape(PRESETS["t5-small"], 512, 128)
        >>> shape.params == num_params(PRESETS["t5-small"])
        True
    """
    mlp = Mlp(hidden=cfg.d_ff, gated=cfg.mlp == "gated-gelu")
    rotary = cfg.positions == "rotary"

    def attention(queries: int, keys: int, own: bool) -> Attention:
        chosen = choose(
            cfg.attention,
            capability=capability,
            dtype=cfg.dtype,
            head_dim=cfg.head_dim,
            queries=queries,
            keys=keys,
            biased=own and cfg.positions == "relative",
        )
        fused = chosen.name != "xla"
        return Attention(queries, keys, cfg.num_heads, cfg.head_dim, fused=fused, rotary=own and rotary)

    common: dict[str, Any] = {"width": cfg.d_model, "mlp": mlp, "bias": False, "norm_params": 1}
    encoder = BlockShape("encoder", tokens=source_len, attentions=(attention(source_len, source_len, True),), **common)
    both = (attention(target_len, target_len, True), attention(target_len, source_len, False))
    decoder = BlockShape("decoder", tokens=target_len, attentions=both, **common)
    whole = encdec_params(cfg) - cfg.num_encoder_layers * encoder.params - cfg.num_decoder_layers * decoder.params
    head = cfg.d_model + (0 if cfg.tied else cfg.vocab_size * cfg.d_model)
    return ModelShape(
        kinds=cfg.kinds,
        blocks={"encoder": encoder, "decoder": decoder},
        width=cfg.d_model,
        vocab=cfg.vocab_size,
        carry_tokens=source_len + target_len,
        head_tokens=target_len,
        seq_len=target_len,
        embed_params=whole - head,
        head_params=head,
        tied=cfg.tied,
        dtype=cfg.dtype,
        param_dtype=cfg.param_dtype,
        fields={"source_len": source_len, "target_len": target_len, **dataclasses.asdict(cfg)},
        logits_at_once=LOGITS_AT_ONCE,
    )


def costing(shape: ModelShape, device: DeviceSpec) -> Costing:
    """Costs by formula, of programs that the installed jaxlib compiles."""
    return lambda rows, tensor: dataclasses.replace(
        analytic(shape, device, rows=rows, tensor=tensor), passes_in_place=PASSES_IN_PLACE
    )


def ask(
    config: Config,
    device: DeviceSpec,
    devices: int,
    *,
    batch: int | None = None,
    space: Space | None = None,
    costs: Costing | None = None,
) -> Problem:
    """The question that a config leaves open: everything about where and when, nothing about what is computed.

    Args:
        config: Its model, sequence length, batch, head and `scan_blocks` count.
        device: The devices.
        devices: How many.
        batch: Rows of a step; by default the config's.
        space: What may be chosen; by default everything.
        costs: By default those by formula.
    """
    shape = gpt_shape(config.model, config.train.seq_len, device.capability)
    space = space or Space()
    if config.schedule.scan_blocks:
        space = replace(space, schedules=[name for name in space.schedules if name not in SPLIT])
    return Problem(
        shape=shape,
        device=device,
        devices=devices,
        batch=batch or config.train.batch_size,
        costs=costs or costing(shape, device),
        space=replace(space, heads=(config.schedule.head,)),
    )


def planned(config: Config, plan: Plan) -> Config:
    """The config with a plan put in."""
    o = plan.option
    even = len(set(plan.counts)) == 1
    mesh = {"pipe": o.pipe, "data": o.data, "fsdp": o.fsdp, "tensor": o.tensor}
    simulate = o.pipe * o.data * o.fsdp * o.tensor if config.mesh.simulate else 0
    return replace(
        config,
        mesh=replace(config.mesh, simulate=simulate, **mesh),
        schedule=replace(
            config.schedule,
            name=o.schedule,
            repeats=o.repeats,
            microbatches=o.microbatches,
            stages="" if even else plan.layout,
            remat=o.remat,
            packing=plan.packing,
            memory=plan.order,
        ),
        train=replace(config.train, batch_size=plan.batch),
    )


@dataclass(frozen=True)
class Resolved:
    """A config with nothing left open, and the plan that was made for it.

    Attributes:
        config: The config.
        plan: What it is predicted to take; None where nothing can be predicted.
        answer: Of the search, if there was one.
    """

    config: Config
    plan: Plan | None
    answer: Answer | None = None


def is_open(config: Config) -> bool:
    """Whether the config leaves something to the planner."""
    return "auto" in (config.schedule.name, config.schedule.stages)


def resolve(config: Config, device: DeviceSpec, costs: Costing | None = None) -> Resolved:
    """Fills in ``schedule.name = "auto"`` (with its repeats) and ``schedule.stages = "auto"``, and predicts the step.

    What is not ``auto`` stays as it is: mesh, microbatches, remat.

    Args:
        config: A run.
        device: What it runs on.
        costs: By default those by formula.

    Raises:
        ConfigError: Nothing that is left open makes it fit, or the costs are another model's.
    """
    mine = config.schedule
    if not isinstance(mine.remat, str):
        if is_open(config):
            raise ConfigError(
                f"schedule.remat={list(mine.remat)} must be one value where schedule.name or schedule.stages is "
                "'auto'; try 'none'"
            )
        return Resolved(config, None)
    space = _space_of(config)
    mesh = config.mesh
    problem = ask(config, device, _num_devices(mesh), space=space, costs=costs)
    if not is_open(config):
        problem = replace(problem, memory_bytes=float("inf"))
    answer = search(problem, pareto=False)
    if answer.best is None:
        if not is_open(config):
            return Resolved(config, None)
        raise ConfigError(nothing_fits(answer))
    plan = answer.best
    if not is_open(config):
        return Resolved(config, plan, answer)
    stages = ("" if len(set(plan.counts)) == 1 else plan.layout) if mine.stages == "auto" else mine.stages
    schedule = replace(mine, stages=stages)
    if mine.name == "auto":
        schedule = replace(schedule, name=plan.option.schedule, repeats=plan.option.repeats)
        schedule = replace(schedule, packing=plan.packing, memory=plan.order)
    return Resolved(replace(config, schedule=schedule), plan, answer)


def nothing_fits(answer: Answer) -> str:
    """What to say when no plan fits: the least memory that would do, and what gets there."""
    from jaxpipe.plan.search import way_out

    problem = answer.problem
    rows = f"{problem.devices} {problem.device.name} devices of {problem.limit_bytes / 1e9:.4g} GB"
    if answer.least is None:
        reasons = "; ".join(f"{r.schedule}: {r.reason}" for r in answer.rejected[:2])
        asked = f"batch={problem.batch} on {problem.devices} devices"
        return f"no plan for {asked} exists ({reasons}); try another --global-batch"
    need = answer.least.memory.total / 1e9
    return f"no plan fits {rows}: the least is {need:.4g} GB; try --memory {need * 1.01:.0f}GB, {way_out(answer)}"


def _num_devices(mesh: MeshConfig) -> int:
    return mesh.pipe * mesh.data * mesh.tensor * mesh.fsdp


def _space_of(config: Config) -> Space:
    """What a config leaves open."""
    mine, mesh = config.schedule, config.mesh
    layers = config.model.num_layers
    names: Sequence[str] = SCHEDULES if mine.name == "auto" else (mine.name,)
    repeats = None if mine.name == "auto" else (mine.repeats,)
    counts, split = None, "any"
    if mine.stages == "":
        split = "equal"
    elif mine.stages == "even":
        split = "even"
    elif not isinstance(mine.stages, str):
        counts = mine.stages
    elif mine.stages != "auto":
        counts = parse_stages(mine.stages, mine.stages.count("|") + 1) if mine.name == "auto" else None
        counts = counts or parse_stages(mine.stages, mesh.pipe * mine.repeats)
    if counts is not None and sum(counts) != layers:
        raise PartitionError(f"stages={list(counts)} hold {sum(counts)} blocks but the model has {layers}")
    shards = mesh.data * mesh.fsdp
    return Space(
        schedules=names,
        pipe=(mesh.pipe,),
        repeats=repeats,
        tensor=(mesh.tensor,),
        fsdp=(mesh.fsdp,),
        data=(mesh.data,),
        rows=(config.train.batch_size // (shards * mine.microbatches),),
        microbatches=(mine.microbatches,),
        remats=(mine.remat,),  # pyright: ignore[reportArgumentType]
        counts=counts,
        split=split,
        packing=None if mine.name == "auto" else mine.packing,
        order=None if mine.name == "auto" else mine.memory,
    )


def present_device() -> DeviceSpec:
    """What JAX's first device is, with the memory that JAX has of it.

    Raises:
        ConfigError: The planner does not know it.
    """
    import jax

    first = jax.devices()[0]
    if first.platform == "cpu":
        return find_device("cpu", cores=num_cores())
    limit = (first.memory_stats() or {}).get("bytes_limit")
    return find_device(first.device_kind, memory_bytes=limit)
