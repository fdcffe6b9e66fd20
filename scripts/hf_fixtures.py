"""Makes the tiny models of tests/data/hf and what transformers computes of them, so that tests need no torch.

    pip install '.[parity]'
    python scripts/hf_fixtures.py

Each folder is a model as `save_pretrained` writes it, all of its weights random, and ``expected.safetensors``: a batch,
the logits, the mean loss, and of each tensor's gradient its norm and its product with the tensor. Beside them,
``hf_config_keys.json`` has the keys that a config.json of each family may have for transformers.
"""

import dataclasses
import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "tests" / "data" / "hf"
KEYS = FOLDER.parent / "hf_config_keys.json"
FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "t5")
READS = re.compile(r"config\.([a-z]\w*)\b(?!\()|getattr\(\s*(?:\w+\.)?config,\s*[\"']([a-z]\w*)[\"']")
LEGACY = {
    *("rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings", "layer_types"),
    *("torch_dtype", "name_or_path", "num_labels", "output_attentions", "per_layer_config", "is_causal"),
    *("attn_implementation", "experts_implementation"),
}
"""Keys that transformers' base class reads though no config class has them as a field."""
ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
T5: dict[str, Any] = {"vocab_size": 24, "d_model": 8, "d_ff": 12, "num_layers": 2, "num_heads": 2}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": 24,
            "n_positions": 16,
            "n_embd": 8,
            "n_layer": 2,
            "n_head": 2,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "llama2": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**LLAMA, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama3": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**LLAMA, "head_dim": 8, "rope_parameters": {**ROPE, "original_max_position_embeddings": 8}},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**LLAMA, "sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "head_dim": 6}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "d_kv": 4, "num_decoder_layers": 1}),
    "t5-1.1": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "d_kv": 6, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
}
"""By name the class, its config's, and the config."""


def make(name: str) -> Any:
    """A model of transformers with random numbers in all of its weights."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    model_class, config_class, options = CASES[name]
    torch.manual_seed(sorted(CASES).index(name))
    config = getattr(transformers, config_class)(**options, attn_implementation="eager")
    model = getattr(transformers, model_class)(config).eval()
    if name == "t5-1.1":  # transformers 5 ties what it has not loaded
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in key or ".ln_" in key else 0.0, 0.3)
    return model


def batch(name: str) -> dict[str, Any]:
    """What it reads, as tensors; the names are jaxpipe's."""
    import torch  # pyright: ignore[reportMissingImports]

    generator = torch.Generator().manual_seed(7)

    def ids(length: int):
        return torch.randint(0, 24, (2, length), generator=generator)

    if not name.startswith("t5"):
        return {"tokens": ids(12), "targets": ids(12)}
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    return {"encoder_tokens": ids(9), "encoder_mask": mask, "tokens": ids(7), "targets": ids(7)}


def answer(model: Any, data: dict[str, Any]) -> dict[str, Any]:
    """The logits, the loss, and the gradients, by ``grad`` and the name of their tensor."""
    import torch  # pyright: ignore[reportMissingImports]

    if "encoder_tokens" in data:
        names = {"encoder_tokens": "input_ids", "encoder_mask": "attention_mask", "tokens": "decoder_input_ids"}
        logits = model(**{theirs: data[ours] for ours, theirs in names.items()}, use_cache=False).logits
    else:
        logits = model(input_ids=data["tokens"], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), data["targets"].flatten())
    model.zero_grad()
    loss.backward()
    grads = {f"grad {key}": weight.grad for key, weight in model.named_parameters()}
    return {"logits": logits.detach(), "loss": loss.detach(), **grads}


def config_keys(model_type: str) -> list[str]:
    """The keys of a family: its config's fields, other names and computed ones, and what its model reads of it."""
    from transformers import GenerationConfig  # pyright: ignore[reportMissingImports]
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # pyright: ignore[reportMissingImports]

    config = CONFIG_MAPPING[model_type]
    model = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    read = {one or other for one, other in READS.findall(inspect.getsource(model))}
    found = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map) | set(config().to_dict())
    found |= read | LEGACY | set(GenerationConfig._get_default_generation_params())
    return sorted(key for key in found if not key.startswith("_"))


def main() -> int:
    import transformers  # pyright: ignore[reportMissingImports]

    keys = {name: config_keys(name) for name in FAMILIES}
    KEYS.write_text(json.dumps({"transformers": transformers.__version__, "keys": keys}, indent=1) + "\n")
    make_models()
    return 0


def make_models() -> None:
    """Writes the tiny models."""
    import torch  # pyright: ignore[reportMissingImports]
    from safetensors.torch import save_file

    for name in CASES:
        model, data = make(name), batch(name)
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
        found = answer(model, data)
        weights = dict(model.named_parameters())
        for key in [key for key in found if key.startswith("grad ")]:
            grad = found.pop(key)
            found[key] = torch.stack([grad.norm(), (grad * weights[key.removeprefix("grad ")]).sum().detach()])
        tensors = {
            key: value.to(torch.int32) if not value.is_floating_point() else value for key, value in data.items()
        }
        save_file({**tensors, **found}, FOLDER / name / "expected.safetensors")
        print(name, sum(file.stat().st_size for file in (FOLDER / name).iterdir()), "bytes")


if __name__ == "__main__":
    sys.exit(main())
