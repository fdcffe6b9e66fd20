"""T5, T5 1.1 and Flan-T5."""

from typing import Any

from jaxpipe.models.encdec_config import EncDecConfig
from jaxpipe.models.hf.facts import Facts
from jaxpipe.models.hf.family import Family
from jaxpipe.models.hf.gpt2 import GELU_TANH
from jaxpipe.models.hf.leaves import Heads, Leaf, Turned, leaf


def table(cfg: EncDecConfig) -> tuple[Leaf, ...]:
    """Which tensors are which leaves."""
    encoder, decoder = "encoder.block.{i}.layer", "decoder.block.{i}.layer"
    bias = "layer.0.SelfAttention.relative_attention_bias.weight"
    rows = [
        leaf("embed/table", "shared.weight"),
        leaf("embed/encoder_bias/table", f"encoder.block.0.{bias}"),
        leaf("embed/decoder_bias/table", f"decoder.block.0.{bias}"),
        leaf("embed/memory_norm/scale", "encoder.final_layer_norm.weight"),
        leaf("blocks/encoder/norm1/scale", f"{encoder}.0.layer_norm.weight"),
        *_attention(cfg, "blocks/encoder/attn", f"{encoder}.0.SelfAttention"),
        leaf("blocks/encoder/norm2/scale", f"{encoder}.1.layer_norm.weight"),
        *_mlp(cfg, "blocks/encoder/mlp", f"{encoder}.1.DenseReluDense"),
        leaf("blocks/decoder/norm1/scale", f"{decoder}.0.layer_norm.weight"),
        *_attention(cfg, "blocks/decoder/attn", f"{decoder}.0.SelfAttention"),
        leaf("blocks/decoder/norm2/scale", f"{decoder}.1.layer_norm.weight"),
        *_attention(cfg, "blocks/decoder/cross", f"{decoder}.1.EncDecAttention"),
        leaf("blocks/decoder/norm3/scale", f"{decoder}.2.layer_norm.weight"),
        *_mlp(cfg, "blocks/decoder/mlp", f"{decoder}.2.DenseReluDense"),
        leaf("head/norm/scale", "decoder.final_layer_norm.weight"),
    ]
    if not cfg.tied:
        rows.append(leaf("head/kernel", "lm_head.weight"))
    return tuple(rows)


def _attention(cfg: EncDecConfig, ours: str, theirs: str) -> list[Leaf]:
    by_head = Heads(cfg.num_heads, (1, 1), cfg.head_dim)
    return [
        leaf(f"{ours}/q/kernel", f"{theirs}.q.weight", move=Turned()),
        leaf(f"{ours}/kv/kernel", f"{theirs}.k.weight", f"{theirs}.v.weight", move=by_head),
        leaf(f"{ours}/proj/kernel", f"{theirs}.o.weight", move=Turned()),
    ]


def _mlp(cfg: EncDecConfig, ours: str, theirs: str) -> list[Leaf]:
    names = {"gate": "wi_0", "fc": "wi_1", "proj": "wo"} if cfg.mlp == "gated-gelu" else {"fc": "wi", "proj": "wo"}
    return [leaf(f"{ours}/{name}/kernel", f"{theirs}.{key}.weight", move=Turned()) for name, key in names.items()]


def read(facts: Facts) -> dict[str, Any]:
    """A config.json as fields of ours.

    A head that is tied but not scaled, which transformers 5 makes of T5 1.1, becomes one of its own.
    """
    layers = facts.take("num_layers", int)
    facts.must("is_causal", True)
    facts.must("per_layer_config", {}, None)
    facts.must("decoder_start_token_id", 0, None)
    tied = facts.take("tie_word_embeddings", bool, True)
    return {
        "vocab_size": facts.take("vocab_size", int),
        "num_encoder_layers": layers,
        "num_decoder_layers": facts.take("num_decoder_layers", int, layers),
        "num_heads": facts.take("num_heads", int),
        "d_model": facts.take("d_model", int),
        "head_dim": facts.take("d_kv", int),
        "d_ff": facts.take("d_ff", int),
        "mlp": _mlp_kind(facts),
        "num_buckets": facts.take("relative_attention_num_buckets", int, 32),
        "max_distance": facts.take("relative_attention_max_distance", int, 128),
        "norm_eps": facts.take("layer_norm_epsilon", float, 1e-6),
        "tied": facts.take("scale_decoder_outputs", bool, tied),
    }


def _mlp_kind(facts: Facts) -> str:
    """The kind of MLP. ``feed_forward_proj`` names both halves of it, and two other keys override one each.

    Raises:
        ConfigError: One that we do not have.
    """
    named = facts.choose("feed_forward_proj", {"relu": "relu", "gated-gelu": "gated-gelu"}, "relu")
    gated = facts.take("is_gated_act", bool, named == "gated-gelu")
    choices = dict.fromkeys(GELU_TANH, "gated-gelu") if gated else {"relu": "relu"}
    return facts.choose("dense_act_fn", choices, "relu" if named == "relu" else "gelu_new")


def write(cfg: EncDecConfig) -> dict[str, Any]:
    """A config of ours as a config.json."""
    return {
        "vocab_size": cfg.vocab_size,
        "num_layers": cfg.num_encoder_layers,
        "num_decoder_layers": cfg.num_decoder_layers,
        "num_heads": cfg.num_heads,
        "d_model": cfg.d_model,
        "d_kv": cfg.head_dim,
        "d_ff": cfg.d_ff,
        "feed_forward_proj": cfg.mlp,
        "relative_attention_num_buckets": cfg.num_buckets,
        "relative_attention_max_distance": cfg.max_distance,
        "layer_norm_epsilon": cfg.norm_eps,
        "dropout_rate": cfg.dropout,
        "is_encoder_decoder": True,
        "tie_word_embeddings": cfg.tied,
    }


T5 = Family(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    prefix="",
    read=read,
    lacks=lambda cfg: None if cfg.positions == "relative" else f"positions={cfg.positions!r}",
    write=write,
    table=table,
    ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    twins=lambda cfg: {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        **({"lm_head.weight": "shared.weight"} if cfg.tied else {}),
    },
    fallback={"lm_head.weight": "shared.weight"},
    config=EncDecConfig,
)
