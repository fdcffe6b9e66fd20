"""Every key of a config.json of Hugging Face: none is forgotten, and those of known repositories are no hindrance."""

import json
from pathlib import Path

import pytest
from hf_repositories import FLAN_T5, GPT2, MISTRAL, QWEN3, REPOSITORIES, SMOLLM2

from jaxpipe.errors import ConfigError
from jaxpipe.models.gpt_config import GPTConfig
from jaxpipe.models.hf import read_config
from jaxpipe.models.hf.facts import Facts
from jaxpipe.models.hf.families import FAMILIES
from jaxpipe.models.hf.keys import KEYS

DATA = Path(__file__).parents[1] / "data"
STORED = json.loads((DATA / "hf_config_keys.json").read_text())
CONFIGS = [path / "config.json" for path in sorted((DATA / "hf").iterdir())]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_transformers_is_in_the_table_once(family):
    keys = KEYS[family]
    kinds = [keys.honoured, keys.refused, keys.idle, set(keys.aliases)]
    assert STORED["transformers"]
    assert not set(STORED["keys"][family]) - set().union(*kinds)
    assert sum(map(len, kinds)) == len(set().union(*kinds))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_the_table_says_what_is_read(path):
    table = json.loads(path.read_text())
    family = FAMILIES[table["model_type"]]
    keys = KEYS[family.model_type]
    facts = Facts(table, "", keys)
    family.read(facts)
    assert facts.seen == keys.honoured | keys.refused


@pytest.mark.parametrize("name", REPOSITORIES)
def test_configs_as_repositories_have_them_are_read(name):
    cfg = read_config(REPOSITORIES[name], "config.json", "bfloat16")
    assert cfg.vocab_size == REPOSITORIES[name]["vocab_size"]
    assert getattr(cfg, "sliding_window", None) == (4096 if name == "Mistral" else None)


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        (FLAN_T5, {"dense_act_fn": "gelu"}, "dense_act_fn='gelu' is not supported; it must be one of 'gelu_new'"),
        (FLAN_T5, {"is_gated_act": False}, "dense_act_fn='gelu_new' is not supported; it must be one of 'relu'"),
        (FLAN_T5, {"num_hidden_layers": 3}, "num_hidden_layers=3 names the same as num_layers=8; make them equal"),
        (FLAN_T5, {"decoder_start_token_id": 5}, "decoder_start_token_id=5 is not supported; it must be 0"),
        (GPT2, {"hidden_size": 3}, "hidden_size=3 names the same as n_embd=768; make them equal"),
        (SMOLLM2, {"is_causal": False}, "is_causal=False is not supported; it must be True"),
        (SMOLLM2, {"is_causal": None}, "is_causal=None is not supported"),
        (SMOLLM2, {"per_layer_config": {"0": {"rms_norm_eps": 1.0}}}, "per_layer_config=.* is not supported"),
        (SMOLLM2, {"attention_bias": True}, "attention_bias=True is not supported with mlp_bias=False"),
        (MISTRAL, {"layer_types": ["full_attention"] * 32}, "is not supported with sliding_window=4096; leave it out"),
        (QWEN3, {"layer_types": ["chunked_attention"] * 28}, "must name one of 'full_attention', 'sliding_attention'"),
        (QWEN3, {"layer_types": [["full_attention"]]}, "must name one of 'full_attention', 'sliding_attention'"),
        (QWEN3, {"attention_bias": True}, "attention_bias=True is not supported"),
        (SMOLLM2, {"sliding_windows": 4}, "unknown key sliding_windows=4"),
    ],
)
def test_keys_that_change_numbers_are_refused_by_name(table, change, message):
    with pytest.raises(ConfigError, match=message):
        read_config({**table, **change}, "config.json", "float32")


def test_keys_beside_and_within_the_rope_parameters_count_as_in_transformers():
    def rotary(**keys):
        cfg = read_config({**SMOLLM2, **keys}, "config.json", "float32")
        assert isinstance(cfg, GPTConfig)
        return cfg.rotary_base, cfg.rotary_factor, cfg.rotary_original_len

    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    new = {"rope_type": "default", "rope_theta": 7.0}
    assert rotary(rope_scaling=llama3, rope_theta=5.0, rope_parameters=new) == (5.0, 8.0, 8192)
    assert rotary(rope_scaling={**llama3, "original_max_position_embeddings": 64}) == (1e4, 8.0, 64)
    assert rotary(rope_scaling=llama3, original_max_position_embeddings=32) == (1e4, 8.0, 32)
    assert rotary(rope_scaling={}, rope_parameters=new)[:2] == (7.0, 1.0)


@pytest.mark.parametrize(
    ("key", "field", "missing", "null"),
    [("num_key_value_heads", "kv_heads", 8, 32), ("sliding_window",) * 2 + (4096, None)],
)
def test_a_missing_key_and_null_stand_for_what_transformers_takes(key, field, missing, null):
    without = {name: value for name, value in MISTRAL.items() if name != key}
    assert getattr(read_config(without, "config.json", "float32"), field) == missing
    assert getattr(read_config({**without, key: None}, "config.json", "float32"), field) == null
