"""Llama 2 and 3, Mistral, Qwen2 and Qwen3: one table of keys; what differs is which options each of them has."""

from functools import partial
from typing import Any

from jaxpipe.models.gpt_config import GPTConfig
from jaxpipe.models.hf import rope
from jaxpipe.models.hf.facts import Facts
from jaxpipe.models.hf.family import Family
from jaxpipe.models.hf.leaves import Heads, Leaf, Turned, leaf


def table(cfg: GPTConfig) -> tuple[Leaf, ...]:
    """Which tensors are which leaves."""
    ours, theirs = "blocks/block", "model.layers.{i}"
    by_group = Heads(cfg.kv_heads, (cfg.num_heads // cfg.kv_heads, 1, 1), cfg.head_dim)
    qkv = [f"{theirs}.self_attn.{name}_proj" for name in "qkv"]
    rows = [
        leaf("embed/table", "model.embed_tokens.weight"),
        leaf(f"{ours}/norm1/scale", f"{theirs}.input_layernorm.weight"),
        leaf(f"{ours}/attn/qkv/kernel", *(f"{key}.weight" for key in qkv), move=by_group),
        leaf(f"{ours}/attn/proj/kernel", f"{theirs}.self_attn.o_proj.weight", move=Turned()),
        leaf(f"{ours}/norm2/scale", f"{theirs}.post_attention_layernorm.weight"),
        leaf(f"{ours}/mlp/gate/kernel", f"{theirs}.mlp.gate_proj.weight", move=Turned()),
        leaf(f"{ours}/mlp/fc/kernel", f"{theirs}.mlp.up_proj.weight", move=Turned()),
        leaf(f"{ours}/mlp/proj/kernel", f"{theirs}.mlp.down_proj.weight", move=Turned()),
        leaf("head/norm/scale", "model.norm.weight"),
    ]
    if cfg.has_qkv_bias:
        rows.append(leaf(f"{ours}/attn/qkv/bias", *(f"{key}.bias" for key in qkv), move=by_group))
    if cfg.qk_norm:
        rows.append(leaf(f"{ours}/attn/q_norm/scale", f"{theirs}.self_attn.q_norm.weight"))
        rows.append(leaf(f"{ours}/attn/k_norm/scale", f"{theirs}.self_attn.k_norm.weight"))
    if cfg.bias:
        rows.append(leaf(f"{ours}/attn/proj/bias", f"{theirs}.self_attn.o_proj.bias"))
        for part, key in (("gate", "gate_proj"), ("fc", "up_proj"), ("proj", "down_proj")):
            rows.append(leaf(f"{ours}/mlp/{part}/bias", f"{theirs}.mlp.{key}.bias"))
    if not cfg.tied:
        rows.append(leaf("head/kernel", "lm_head.weight"))
    return tuple(rows)


def read(facts: Facts, model_type: str) -> dict[str, Any]:
    """A config.json as fields of ours."""
    facts.choose("hidden_act", {"silu": None, "swish": None}, "silu")
    facts.must("is_causal", True)
    facts.must("per_layer_config", {}, None)
    heads, width = facts.take("num_attention_heads", int), facts.take("hidden_size", int)
    head_dim = facts.take("head_dim", int, 128 if model_type == "qwen3" else None)
    fields = {
        "vocab_size": facts.take("vocab_size", int),
        "max_seq_len": facts.take("max_position_embeddings", int),
        "num_layers": facts.take("num_hidden_layers", int),
        "num_heads": heads,
        "d_model": width,
        "num_kv_heads": facts.take(
            "num_key_value_heads", int, heads if "num_key_value_heads" in facts else _KV_HEADS.get(model_type, heads)
        ),
        "head_width": None if head_dim and head_dim * heads == width else head_dim,
        "d_ff": facts.take("intermediate_size", int),
        "norm": "rmsnorm",
        "norm_eps": facts.take("rms_norm_eps", float, 1e-6),
        "mlp": "swiglu",
        "bias": False,
        "tied": facts.take("tie_word_embeddings", bool, False),
        "sliding_window": _window(facts, model_type),
        "qk_norm": model_type == "qwen3",
    }
    if model_type == "llama":
        fields["bias"] = facts.take("attention_bias", bool, False)
        if (other := facts.take("mlp_bias", bool, False)) != fields["bias"]:
            raise facts.error(
                f"attention_bias={fields['bias']} is not supported with mlp_bias={other}; both or none may be true"
            )
    elif model_type == "qwen2":
        fields["qkv_bias"] = True
    elif model_type == "qwen3":
        facts.must("attention_bias", False)
    return {**fields, **rope.read(facts)}


_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
"""What a missing number of heads of keys and values stands for; null, and elsewhere: as many as queries."""
_KINDS = {"full_attention": False, "sliding_attention": True}


def _window(facts: Facts, model_type: str) -> int | None:
    """The window of all layers.

    Llama has none, whatever its config says. Mistral's is that of all layers. Qwen's is a choice for each.

    Raises:
        ConfigError: Only some layers have it, or one is of a kind that the model does not have.
    """
    layers, kinds = facts.take("num_hidden_layers", int), facts.take("layer_types", list, [])
    wrong = [kind for kind in kinds if not isinstance(kind, str) or kind not in _KINDS]
    if wrong or (kinds and len(kinds) != layers):
        raise facts.error(
            f"layer_types={kinds} must name one of {', '.join(map(repr, _KINDS))} for each of {layers} layers"
        )
    named = sum(_KINDS[kind] for kind in kinds)
    window = None
    if model_type != "llama":
        window = facts.take("sliding_window", int, None if "sliding_window" in facts else 4096)
    sliding = 0 if window is None else layers
    if model_type.startswith("qwen"):
        whole = facts.take("max_window_layers", int, 28)
        if not facts.take("use_sliding_window", bool, False):
            window = None
        sliding = named if kinds else 0 if window is None else max(0, layers - max(0, whole))
    elif kinds and named != sliding:
        raise facts.error(f"layer_types={kinds} is not supported with sliding_window={window}; leave it out")
    if 0 < sliding < layers:
        raise facts.error(
            f"sliding_window={window} of {sliding} of {layers} layers is not supported; all or none may have it"
        )
    return window if sliding else None


def lacks(cfg: GPTConfig, model_type: str) -> str | None:
    """What the family does not have."""
    own: dict[str, Any] = {
        "positions": "rotary",
        "norm": "rmsnorm",
        "mlp": "swiglu",
        "qk_norm": model_type == "qwen3",
        "has_qkv_bias": cfg.bias if model_type == "llama" else model_type == "qwen2",
    }
    if model_type != "llama":
        own["bias"] = False
    wrong = next((name for name, value in own.items() if getattr(cfg, name) != value), None)
    if wrong is not None:
        return f"{wrong.removeprefix('has_')}={getattr(cfg, wrong)!r}"
    return f"sliding_window={cfg.sliding_window}" if cfg.sliding_window and model_type == "llama" else None


def write(cfg: GPTConfig, model_type: str) -> dict[str, Any]:
    """A config of ours as a config.json."""
    keys = {
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_seq_len,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.kv_heads,
        "hidden_size": cfg.d_model,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.hidden_dim,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied,
        **rope.write(cfg),
    }
    if model_type == "llama":
        keys |= {"attention_bias": cfg.bias, "mlp_bias": cfg.bias}
    else:
        keys["sliding_window"] = cfg.sliding_window
    if model_type in ("qwen2", "qwen3"):
        layers = cfg.num_layers if cfg.sliding_window is None else 0
        keys |= {"use_sliding_window": cfg.sliding_window is not None, "max_window_layers": layers}
    return keys


def _family(model_type: str, architecture: str) -> Family:
    return Family(
        model_type=model_type,
        architecture=architecture,
        prefix="model.",
        read=partial(read, model_type=model_type),
        lacks=partial(lacks, model_type=model_type),
        write=partial(write, model_type=model_type),
        table=table,
        ignored=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
        twins=lambda cfg: {"lm_head.weight": "model.embed_tokens.weight"} if cfg.tied else {},
    )


LLAMA = _family("llama", "LlamaForCausalLM")
MISTRAL = _family("mistral", "MistralForCausalLM")
QWEN2 = _family("qwen2", "Qwen2ForCausalLM")
QWEN3 = _family("qwen3", "Qwen3ForCausalLM")
