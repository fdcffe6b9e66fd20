"""Each key of a config.json changed, and transformers' logits with it (extra `parity`): ours follow, or refuse."""

import functools
import json
import runpy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import QUICK
from hf_models import CPU, as_jax, logits, model_of
from safetensors.numpy import save_file

from jaxpipe.checkpoint.weights import open_hf
from jaxpipe.errors import JaxpipeError
from jaxpipe.models.hf import read_config
from jaxpipe.models.hf.keys import KEYS

for library in ("torch", "transformers"):
    pytest.importorskip(library, reason=f"compares with transformers: {library} is missing, see the extra parity")

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "hf_fixtures.py"))
DATA = Path(__file__).parents[1] / "data"
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.slow]  # torch's own warnings

ROPE = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0}
WINDOWED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0, "layer_types": None}
BASES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "gpt2": [("gpt2", {})],
    "llama": [("llama2", {}), ("llama3", {})],
    "mistral": [("mistral", {})],
    "qwen2": [("qwen2", {}), ("qwen2", WINDOWED)],
    "qwen3": [("qwen3", {}), ("qwen3", WINDOWED)],
    "t5": [("t5", {}), ("t5-1.1", {})],
}
"""By family the stored configs from which keys are changed one by one."""

MISSING = object()
LINEAR = {"rope_type": "linear", "factor": 2.0}
SPECIAL: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu", "relu", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate", "gelu_python_tanh"),
    "hidden_act": ("gelu", "swish", "relu"),
    "feed_forward_proj": ("relu", "gated-gelu", "gated-silu", "gelu", "gated-relu", "silu"),
    "dense_act_fn": ("relu", "gelu", "gelu_new", "silu", "gelu_pytorch_tanh"),
    "layer_types": (
        ["full_attention"] * 2,
        ["sliding_attention"] * 2,
        ["full_attention", "sliding_attention"],
        ["chunked_attention"] * 2,
        ["full_attention"],
    ),
    "sliding_window": (None, 2, 3, 4, 64),
    "max_window_layers": (0, 1, 2, 9),
    "rope_theta": (500.0, 20000, None),
    "rope_scaling": ({**ROPE, "original_max_position_embeddings": 8}, ROPE, LINEAR, {"type": "default", "factor": 3.0}),
    "rope_parameters": (
        {"rope_type": "default", "rope_theta": 700.0},
        {**ROPE, "rope_theta": 9e3, "original_max_position_embeddings": 8},
        {**ROPE, "rope_theta": 9e3},
        {**LINEAR, "rope_theta": 1e4},
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        {"full_attention": {"rope_type": "default", "rope_theta": 5.0}},
    ),
    "original_max_position_embeddings": (4, 16),
    "per_layer_config": ({}, {"1": {"rms_norm_eps": 0.5, "layer_norm_epsilon": 0.5}}),
    "num_key_value_heads": (None, 1, 2, 4),
    "head_dim": (None, 4, 8),
    "partial_rotary_factor": (0.5, 1.0),
    "dtype": ("float32",),
    "torch_dtype": ("float32",),
    "architectures": (["Other"],),
    "id2label": ({"0": "a", "1": "b", "2": "c"},),
    "label2id": ({"a": 0, "b": 1, "c": 2},),
    "problem_type": ("regression",),
    "attn_implementation": ("sdpa",),
    "experts_implementation": ("eager",),
    "auto_map": ({"AutoConfig": "configuration_x.XConfig"},),
    "quantization_config": ({"quant_method": "awq", "bits": 4},),
    "vocab_size": (24, 30),
    "n_positions": (16, 20),
    "max_position_embeddings": (16, 64, 80),
    "rms_norm_eps": (0.3,),
    "layer_norm_epsilon": (0.3,),
    "relative_attention_num_buckets": (8, 16),
    "relative_attention_max_distance": (6, 64),
    "n_embd": (16,),
    "hidden_size": (8, 16),
    "d_model": (16,),
    "num_layers": (1, 3),
    "n_layer": (1, 3),
    "num_hidden_layers": (1, 2, 3),
    "num_decoder_layers": (None, 1, 3),
    "num_attention_heads": (2, 4, 8),
    "n_head": (1, 4),
    "num_heads": (1, 4),
    "decoder_start_token_id": (0, 3),
    "pruned_heads": ({}, {"0": [0]}),
}
UNKNOWN = (None, True, False, 2, "x")
"""Values of a key of which nothing is known."""


def values(key: str, table: dict[str, Any]) -> list[Any]:
    """What a key is changed to; gone is one of them."""
    if key in ("model_type", "transformers_version", "auto_map") or key.startswith("_"):
        return []
    found = table.get(key, MISSING)
    if key in SPECIAL:
        chosen = list(SPECIAL[key])
    elif isinstance(found, bool):
        chosen = [not found]
    elif isinstance(found, int):
        chosen = [found + 1, 0]
    elif isinstance(found, float):
        chosen = [found + 0.25]
    else:
        chosen = list(UNKNOWN)
    return [value for value in (*chosen, MISSING) if value is not found and (value is MISSING or value != found)]


def theirs(table: dict[str, Any], data: dict[str, Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The logits of transformers for a config.json, and the weights that it used, as a file would hold them."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # pyright: ignore[reportMissingImports]

    config = CONFIG_MAPPING[table["model_type"]].from_dict(json.loads(json.dumps(table)))
    t5 = table["model_type"] == "t5"
    auto = transformers.AutoModelForSeq2SeqLM if t5 else transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").float().eval()
    if t5 and not config.scale_decoder_outputs:  # transformers 5 ties what it has not loaded
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    weights = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            random, mean = np.random.default_rng(list(name.encode())), float("norm" in name or ".ln_" in name)
            weights[name] = random.normal(mean, 0.3, tuple(weight.shape)).astype("f4")
            weight.copy_(torch.tensor(weights[name]))
        return np.asarray(_logits(model, data)), weights


def _logits(model: Any, data: dict[str, Any]) -> Any:
    if "encoder_tokens" in data:
        names = {"encoder_tokens": "input_ids", "encoder_mask": "attention_mask", "tokens": "decoder_input_ids"}
        return model(**{theirs: data[ours] for ours, theirs in names.items()}, use_cache=False, return_dict=True).logits
    return model(input_ids=data["tokens"], use_cache=False, return_dict=True).logits


def ours(table: dict[str, Any], weights: dict[str, np.ndarray], data: dict[str, Any], path: Path) -> np.ndarray:
    """Our logits for a folder with that config.json and those weights."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(table))
    save_file(weights, path / "model.safetensors")
    cfg, opened = open_hf(path)
    with jax.default_matmul_precision("highest"):
        compute = jax.jit(functools.partial(logits, model_of(cfg), batch=as_jax(data)))
        canonical = opened.tree(lambda shape: CPU)
        return np.asarray(compute.lower(canonical).compile(compiler_options=QUICK)(canonical))


@functools.cache
def stored(name: str) -> dict[str, Any]:
    return json.loads((DATA / "hf" / name / "config.json").read_text())


def wrong(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.shape != expected.shape or bool(np.abs(found - expected).max() > 1e-4 * max(np.abs(expected).max(), 1))


@pytest.mark.parametrize(("family", "number"), [(name, n) for name, bases in BASES.items() for n in range(len(bases))])
def test_a_changed_key_changes_both_or_is_refused(family, number, tmp_path):
    name, changes = BASES[family][number]
    base, data = {**stored(name), **changes}, SCRIPT["batch"](name)
    plain, weights = theirs(base, data)
    assert not wrong(ours(base, weights, data, tmp_path / "base"), plain)
    cfg, keys, names, said = read_config(base, "", "float32"), KEYS[family], set(weights), []
    listed = set(SCRIPT["config_keys"](family)) | keys.honoured | keys.refused | keys.idle | set(keys.aliases)
    moved, refused = set(), set()
    for key in sorted(listed):
        for value in values(key, base):
            table = {k: v for k, v in base.items() if k != key} | ({} if value is MISSING else {key: value})
            label = f"{key}={'gone' if value is MISSING else value!r}"
            try:
                expected, weights = theirs(table, data)
            except Exception:  # it takes nothing of the kind; neither must we, but we may
                expected = None
            try:
                same = read_config(table, "", "float32") == cfg and (expected is None or set(weights) == names)
            except JaxpipeError:
                refused.add(key)
                if key in keys.idle:
                    said.append(f"{label} is refused")
                continue
            if expected is None:
                continue
            if wrong(expected, plain):
                moved.add(key)
            try:
                found = plain if same else ours(table, weights, data, tmp_path / "changed")
            except JaxpipeError as error:
                refused.add(key)
                said.append(f"{label}: {error}")
                continue
            if wrong(found, expected):
                difference = np.abs(found - expected).max() if found.shape == expected.shape else "shape"
                said.append(f"{label} is off by {difference}")
    assert not said
    assert not moved & keys.idle
    assert not keys.refused - refused


@pytest.mark.parametrize("family", BASES)
def test_the_table_has_every_key_of_this_transformers(family):
    import transformers  # pyright: ignore[reportMissingImports]

    stored, now = json.loads(SCRIPT["KEYS"].read_text()), SCRIPT["config_keys"](family)
    keys = KEYS[family]
    assert not set(now) - keys.honoured - keys.refused - keys.idle - set(keys.aliases)
    assert stored["transformers"] != transformers.__version__ or stored["keys"][family] == now
