"""Rotary positions in a config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`."""

from typing import Any

from jaxpipe.models.gpt_config import GPTConfig
from jaxpipe.models.hf.facts import Facts

_NUMBERS = {
    "factor": "rotary_factor",
    "low_freq_factor": "rotary_low_freq_factor",
    "high_freq_factor": "rotary_high_freq_factor",
    "original_max_position_embeddings": "rotary_original_len",
}


_OTHER_TYPES = {
    *_NUMBERS,
    *("attention_factor", "beta_fast", "beta_slow", "short_factor", "long_factor", "mscale", "mscale_all_dim"),
    *("truncate", "mrope_section", "finetuned"),
}
"""Keys that decide about numbers in the types of scaling that have them, and in no other."""


def read(facts: Facts) -> dict[str, Any]:
    """The fields of ours.

    Of the two dicts the older one counts where it holds anything; a key beside them only where they lack it, but for
    ``original_max_position_embeddings``, which counts first. That is how transformers reads them.

    Raises:
        ConfigError: A type of scaling that we do not have.
    """
    facts.must("partial_rotary_factor", 1.0, None)
    new, old = facts.take("rope_parameters", dict, {}), facts.take("rope_scaling", dict, {})
    scaling = {key: value for key, value in (old or new).items() if value is not None}
    kind = scaling.pop("rope_type", scaling.get("type", "default"))
    scaling.pop("type", None)
    base = scaling.pop("rope_theta", facts.take("rope_theta", float, 10000.0))
    if not isinstance(base, int | float):
        raise facts.error(f"rope_theta={base!r} must be a number")
    fields: dict[str, Any] = {"positions": "rotary", "rotary_base": float(base)}
    if scaling.pop("partial_rotary_factor", 1.0) != 1.0:
        raise facts.error("partial_rotary_factor below 1 is not supported; it must be 1.0")
    if kind not in ("default", "llama3"):
        raise facts.error(f"rope type {kind!r} is not supported; it must be 'default' or 'llama3'")
    length = facts.take("original_max_position_embeddings", int, scaling.get("original_max_position_embeddings"))
    if kind == "llama3":
        scaling["original_max_position_embeddings"] = length or facts.take("max_position_embeddings", int)
        for theirs, ours in _NUMBERS.items():
            if not isinstance(value := scaling.pop(theirs, None), int | float):
                raise facts.error(f"rope type 'llama3' needs the number {theirs!r}; it is {value!r}")
            fields[ours] = int(value) if ours == "rotary_original_len" else float(value)
    if unknown := sorted(set(scaling) - _OTHER_TYPES):
        raise facts.error(f"unknown key {unknown[0]!r} of the rope type {kind!r}")
    return fields


def write(cfg: GPTConfig) -> dict[str, Any]:
    """The keys of theirs, in the form that every version of transformers reads."""
    scaling = None
    if cfg.rotary_factor != 1.0:
        scaling = {"rope_type": "llama3", **{theirs: getattr(cfg, ours) for theirs, ours in _NUMBERS.items()}}
    return {"rope_theta": cfg.rotary_base, "rope_scaling": scaling}
