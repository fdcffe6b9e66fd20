"""Weights of Hugging Face: the numbers of transformers (stored, see scripts/hf_fixtures.py), keys, configs."""

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from hf_models import answer, as_jax, close, write_folder
from safetensors.numpy import load_file, save_file

from jaxpipe.checkpoint.convert import from_hf
from jaxpipe.checkpoint.weights import HFWeights, open_hf, over
from jaxpipe.errors import ConfigError, DataError
from jaxpipe.models.encdec import PRESETS as ENCDEC
from jaxpipe.models.gpt import PRESETS
from jaxpipe.models.gpt_config import GPTConfig
from jaxpipe.models.hf import config_json, family_for, leaf_shapes, read_config
from jaxpipe.runtime.layout.mesh import make_mesh

DATA = Path(__file__).parents[1] / "data" / "hf"
NAMES = sorted(path.name for path in DATA.iterdir())
TINY = replace(PRESETS["tiny"], num_layers=2, num_heads=2, d_model=8, vocab_size=24, max_seq_len=16)
LLAMA = GPTConfig(
    vocab_size=24,
    max_seq_len=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    d_model=8,
    d_ff=12,
    positions="rotary",
    norm="rmsnorm",
    mlp="swiglu",
    bias=False,
    tied=False,
)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_are_those_of_transformers(name):
    cfg, weights = open_hf(DATA / name)
    expected = load_file(DATA / name / "expected.safetensors")
    batch = {key: expected.pop(key) for key in list(expected) if key.endswith(("tokens", "targets", "mask"))}
    with jax.default_matmul_precision("highest"):
        found = answer(cfg, weights, as_jax(batch))
    close(found["logits"], expected["logits"], 1e-4)
    close(found["loss"], expected["loss"], 1e-4)
    tensors = load_file(DATA / name / "model.safetensors")
    for key in expected:
        if key.startswith("grad "):
            grad = np.asarray(found[key], np.float64)
            close([np.linalg.norm(grad), np.sum(grad * tensors[key.removeprefix("grad ")])], expected[key], 1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_configs_and_tensors_go_there_and_back(name):
    cfg, weights = open_hf(DATA / name)
    assert read_config(config_json(cfg), "config.json", "float32") == cfg
    assert {leaf.path for leaf in weights.table} == set(leaf_shapes(cfg))
    tensors, seen = load_file(DATA / name / "model.safetensors"), set()
    for leaf in weights.table:
        whole = weights.part(leaf)
        for (key, shape), part in zip(leaf.tensors(whole.shape), leaf.give(whole), strict=True):
            assert part.shape == shape and part.tobytes() == tensors[key].tobytes()
            seen.add(key)
        some = tuple(slice(1, None) if size > 1 else slice(None) for size in whole.shape)
        assert np.array_equal(weights.part(leaf, some), whole[some])
    assert seen == set(tensors)


def test_shards_are_read_by_each_device_and_cast(tmp_path):
    tensors = write_folder(tmp_path / "hf", TINY, dtype=ml_dtypes.bfloat16, max_bytes=900)
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 2
    cfg, weights = open_hf(tmp_path / "hf", "float32")
    tree = weights.tree(over(make_mesh(pipe=2, fsdp=2)))
    kernel = tree["blocks"]["block"]["mlp"]["fc"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(1, 4, 32)}
    assert np.array_equal(kernel[1], tensors["transformer.h.1.mlp.c_fc.weight"].astype(np.float32))
    assert (cfg.dtype, cfg.param_dtype, kernel.dtype.name) == ("float32",) * 3
    assert open_hf(tmp_path / "hf")[0].param_dtype == "bfloat16"


def test_other_ways_to_save_the_same_model_are_read(tmp_path):
    write_folder(tmp_path / "hf", TINY)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    bare = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    save_file({**bare, "h.0.attn.bias": np.ones((1, 1, 16, 16), np.uint8), "lm_head.weight": bare["wte.weight"]}, file)
    _, weights = open_hf(tmp_path / "hf")
    assert np.array_equal(weights.part(weights.table[0]), bare["wte.weight"])

    cfg = replace(ENCDEC["tiny"], vocab_size=24, d_model=8, d_ff=12, head_dim=4, tied=False)
    write_folder(tmp_path / "t5", cfg)
    tensors = load_file(tmp_path / "t5" / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "t5" / "model.safetensors")
    _, weights = open_hf(tmp_path / "t5")
    assert np.array_equal(weights.part(weights.table[-1]), tensors["shared.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gptj"}, "model_type='gptj' .* not supported; it must be one of 'gpt2', 'llama'.*such as"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope type 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "needs the number 'factor'"),
        ({"rope_parameters": {"full_attention": {}}}, "unknown key 'full_attention' of the rope type 'default'"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": "x"}}, "rope_theta='x' must be a number"),
        ({"model_type": ["llama"], "architectures": 5}, "is not supported; it must be one of"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported; it must be one of 'silu'"),
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"hidden_size": "8"}, "hidden_size='8' must be of type int"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3 must divide"),
        ({"mlp_bias": True}, "attention_bias=False is not supported with mlp_bias=True"),
        ({"quantization_config": {}}, "quantization_config is not supported"),
        ({"router_bias": 1}, "unknown key router_bias=1"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "1 of 2"),
    ],
)
def test_what_a_config_has_and_we_do_not_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        read_config({**config_json(LLAMA), **change}, "x/config.json", "float32")


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (replace(TINY, positions="rotary"), "gpt2 has no positions='rotary', llama has no norm='layernorm'"),
        (replace(TINY, num_experts=2), "num_experts=2"),
        (replace(LLAMA, sliding_window=4, qkv_bias=True, qk_norm=True), "mistral has no qk_norm=True"),
    ],
)
def test_a_model_of_no_architecture_is_told(cfg, message):
    with pytest.raises(ConfigError, match=message):
        family_for(cfg)


def test_families_are_told_apart_by_their_options():
    found = {
        family_for(cfg).model_type: cfg
        for cfg in (
            TINY,
            LLAMA,
            replace(LLAMA, sliding_window=4),
            replace(LLAMA, qkv_bias=True, sliding_window=4),
            replace(LLAMA, qk_norm=True, head_width=6),
            ENCDEC["tiny"],
        )
    }
    assert list(found) == ["gpt2", "llama", "mistral", "qwen2", "qwen3", "t5"]
    assert all(read_config(config_json(cfg), "", "float32") == cfg for cfg in found.values())


def _damaged(folder: Path, name: str) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    match name:
        case "missing":
            del tensors["transformer.ln_f.bias"]
        case "unknown":
            tensors["score.weight"] = np.ones(3, np.float32)
        case "shape":
            tensors["transformer.wpe.weight"] = np.ones((3, 8), np.float32)
        case "type":
            tensors["transformer.ln_f.bias"] = np.ones(8, np.int32)
        case "tied":
            tensors["lm_head.weight"] = np.ones((24, 8), np.float32)
        case "half":
            tensors = {key: value.astype(np.float16) for key, value in tensors.items()}
    save_file(tensors, file)
    match name:
        case "torn":
            file.write_bytes(file.read_bytes()[:-9])
        case "index":
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
        case "shard":
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
        case "pickled":
            file.rename(folder / "pytorch_model.bin")
        case "none":
            file.unlink()
        case "json":
            (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("missing", DataError, "lacks the tensor 'transformer.ln_f.bias'"),
        ("unknown", DataError, "unknown tensor 'score.weight'"),
        ("shape", DataError, r"'transformer.wpe.weight' has shape \[3, 8\] but its config makes it \[16, 8\]"),
        ("type", DataError, "'transformer.ln_f.bias' has type I32"),
        ("tied", DataError, "'lm_head.weight' differs from 'transformer.wte.weight'"),
        ("half", ConfigError, "holds float16.*try --dtype float32"),
        ("torn", DataError, "is no whole safetensors file"),
        ("index", DataError, "has no 'weight_map' from keys to files beside it"),
        ("shard", DataError, "x.safetensors is missing"),
        ("pickled", ConfigError, "weights in pytorch_model.bin, and unpickling runs code; save them as safetensors"),
        ("none", ConfigError, "has neither model.safetensors nor"),
        ("json", DataError, "config.json cannot be read as JSON"),
    ],
)
def test_a_damaged_folder_is_one_line(name, error, message, tmp_path):
    write_folder(tmp_path / "hf", TINY)
    _damaged(tmp_path / "hf", name)
    with pytest.raises(error, match=message) as caught:
        open_hf(tmp_path / "hf")
    assert "\n" not in str(caught.value)
    shutil.rmtree(tmp_path / "hf")
    with pytest.raises(ConfigError, match="does not exist"):
        open_hf(tmp_path / "hf")


def test_a_conversion_holds_one_array_at_a_time(tmp_path, monkeypatch):
    write_folder(tmp_path / "hf", TINY)
    alive, most, part = set(), [], HFWeights.part

    def watched(self, leaf, index=None):
        array = part(self, leaf, index)
        alive.add(leaf.path)
        weakref.finalize(array, alive.discard, leaf.path)
        most.append(len(alive))
        return array

    monkeypatch.setattr(HFWeights, "part", watched)
    from_hf(tmp_path / "hf", tmp_path / "run")
    assert len(most) == len(leaf_shapes(TINY)) and max(most) <= 2
