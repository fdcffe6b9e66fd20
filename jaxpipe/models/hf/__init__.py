"""Weights of Hugging Face: which of their tensors is which of our leaves, and how configs translate. No torch.

A family (`gpt2`, `llama`, `t5`) is one file: its config both ways, and its table of tensors; `families` lists them,
`family` says what one is.

    facts   a config.json read strictly; `keys` what becomes of every key, `rope` of those of rotary positions
    files   a folder: safetensors in pieces, and nothing is ever unpickled
    leaves  which tensors make a leaf; `shapes` of all leaves

Read `family` first.
"""

from jaxpipe.models.hf.families import Family, config_json, family_for, family_of, read_config
from jaxpipe.models.hf.files import HFFolder, write_shards
from jaxpipe.models.hf.leaves import Leaf, read_part
from jaxpipe.models.hf.shapes import leaf_shapes

__all__ = [
    "Family",
    "HFFolder",
    "Leaf",
    "config_json",
    "family_for",
    "family_of",
    "leaf_shapes",
    "read_config",
    "read_part",
    "write_shards",
]
