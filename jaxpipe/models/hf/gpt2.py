"""GPT-2. Its linear maps are stored [in, out], as ours are."""

from typing import Any

from jaxpipe.models.gpt_config import GPTConfig
from jaxpipe.models.hf.facts import Facts
from jaxpipe.models.hf.family import Family
from jaxpipe.models.hf.leaves import Interleaved, Leaf, leaf

GELU_TANH: dict[str, str] = dict.fromkeys(
    ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), "gelu"
)
"""The names in transformers of the GELU that goes through tanh; ``gelu`` is another."""


def table(cfg: GPTConfig) -> tuple[Leaf, ...]:
    """Which tensors are which leaves."""
    ours, theirs = "blocks/block", "transformer.h.{i}"
    by_head = Interleaved(cfg.num_heads)
    rows = (
        leaf("embed/table", "transformer.wte.weight"),
        leaf("embed/positions", "transformer.wpe.weight"),
        leaf(f"{ours}/norm1/scale", f"{theirs}.ln_1.weight"),
        leaf(f"{ours}/norm1/bias", f"{theirs}.ln_1.bias"),
        leaf(f"{ours}/attn/qkv/kernel", f"{theirs}.attn.c_attn.weight", move=by_head),
        leaf(f"{ours}/attn/qkv/bias", f"{theirs}.attn.c_attn.bias", move=by_head),
        leaf(f"{ours}/attn/proj/kernel", f"{theirs}.attn.c_proj.weight"),
        leaf(f"{ours}/attn/proj/bias", f"{theirs}.attn.c_proj.bias"),
        leaf(f"{ours}/norm2/scale", f"{theirs}.ln_2.weight"),
        leaf(f"{ours}/norm2/bias", f"{theirs}.ln_2.bias"),
        leaf(f"{ours}/mlp/fc/kernel", f"{theirs}.mlp.c_fc.weight"),
        leaf(f"{ours}/mlp/fc/bias", f"{theirs}.mlp.c_fc.bias"),
        leaf(f"{ours}/mlp/proj/kernel", f"{theirs}.mlp.c_proj.weight"),
        leaf(f"{ours}/mlp/proj/bias", f"{theirs}.mlp.c_proj.bias"),
        leaf("head/norm/scale", "transformer.ln_f.weight"),
        leaf("head/norm/bias", "transformer.ln_f.bias"),
    )
    return rows if cfg.tied else (*rows, leaf("head/kernel", "lm_head.weight"))


def read(facts: Facts) -> dict[str, Any]:
    """A config.json as fields of ours."""
    facts.must("scale_attn_weights", True)
    facts.must("scale_attn_by_inverse_layer_idx", False)
    facts.must("add_cross_attention", False)
    facts.must("is_causal", True)
    facts.must("per_layer_config", {}, None)
    return {
        "vocab_size": facts.take("vocab_size", int),
        "max_seq_len": facts.take("n_positions", int),
        "num_layers": facts.take("n_layer", int),
        "num_heads": facts.take("n_head", int),
        "d_model": facts.take("n_embd", int),
        "d_ff": facts.take("n_inner", int, None),
        "norm_eps": facts.take("layer_norm_epsilon", float, 1e-5),
        "mlp": facts.choose("activation_function", GELU_TANH, "gelu_new"),
        "tied": facts.take("tie_word_embeddings", bool, True),
    }


def lacks(cfg: GPTConfig) -> str | None:
    """What GPT-2 does not have."""
    own: dict[str, Any] = {"positions": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True}
    wrong = next((name for name, value in own.items() if getattr(cfg, name) != value), None)
    if wrong is not None:
        return f"{wrong}={getattr(cfg, wrong)!r}"
    if cfg.kv_heads != cfg.num_heads:
        return f"num_kv_heads={cfg.num_kv_heads}"
    if cfg.head_dim * cfg.num_heads != cfg.d_model:
        return f"head_width={cfg.head_width}"
    if not cfg.has_qkv_bias:
        return f"qkv_bias={cfg.qkv_bias}"
    return f"sliding_window={cfg.sliding_window}" if cfg.sliding_window else "qk_norm=True" if cfg.qk_norm else None


def write(cfg: GPTConfig) -> dict[str, Any]:
    """A config of ours as a config.json."""
    return {
        "vocab_size": cfg.vocab_size,
        "n_positions": cfg.max_seq_len,
        "n_layer": cfg.num_layers,
        "n_head": cfg.num_heads,
        "n_embd": cfg.d_model,
        "n_inner": cfg.d_ff,
        "layer_norm_epsilon": cfg.norm_eps,
        "activation_function": "gelu_new",
        "embd_pdrop": cfg.dropout,
        "resid_pdrop": cfg.dropout,
        "attn_pdrop": 0.0,
        "scale_attn_weights": True,
        "tie_word_embeddings": cfg.tied,
    }


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    read=read,
    lacks=lacks,
    write=write,
    table=table,
    ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    twins=lambda cfg: {"lm_head.weight": "transformer.wte.weight"} if cfg.tied else {},
)
