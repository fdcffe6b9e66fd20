"""Every key of a config.json of Hugging Face: that none is forgotten, and what becomes of those of known repositories."""

import json
from pathlib import Path

import pytest

from jaxpipe.errors import ConfigError
from jaxpipe.models.hf import config_json, read_config
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
