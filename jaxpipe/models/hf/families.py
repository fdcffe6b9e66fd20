"""All families, and a model's config both ways."""

import difflib
from collections.abc import Mapping
from typing import Any

from jaxpipe.errors import ConfigError
from jaxpipe.models.hf.facts import Facts
from jaxpipe.models.hf.family import Family, ModelConfig
from jaxpipe.models.hf.gpt2 import GPT2
from jaxpipe.models.hf.keys import KEYS
from jaxpipe.models.hf.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from jaxpipe.models.hf.t5 import T5

FAMILIES = {family.model_type: family for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, T5)}


def family_of(table: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json.

    Args:
        table: Its keys.
        where: What messages call it.

    Raises:
        ConfigError: We do not have it.
    """
    name = table.get("model_type")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    near = difflib.get_close_matches(str(name), FAMILIES, n=1)
    classes = table.get("architectures")
    named = f" ({classes[0]})" if classes and isinstance(classes, list) else ""
    hint = f", such as {near[0]!r}" if near else ""
    known = ", ".join(map(repr, FAMILIES))
    raise ConfigError(f"{where}: model_type={name!r}{named} is not supported; it must be one of {known}{hint}")


def read_config(table: Mapping[str, Any], where: str, dtype: str) -> ModelConfig:
    """A config.json as a config of ours.

    Args:
        table: Its keys.
        where: What messages call it.
        dtype: Of parameters and computation.

    Raises:
        ConfigError: An architecture, an option or a key that we do not have.

    Example:
        >>> from jaxpipe.models import gpt_config
        >>> cfg = read_config(config_json(gpt_config.PRESETS["gpt2-124m"]), "config.json", "float32")
        >>> cfg.d_model, cfg.tied
        (768, True)
    """
    family = family_of(table, where)
    facts = Facts(table, where, KEYS[family.model_type])
    fields = family.read(facts)
    facts.end()
    try:
        return family.config(**fields, dtype=dtype, param_dtype=dtype)  # pyright: ignore[reportArgumentType]
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def family_for(cfg: ModelConfig) -> Family:
    """The family that a config of ours can be written as.

    Raises:
        ConfigError: None has all of its options.
    """
    known = [family for family in FAMILIES.values() if isinstance(cfg, family.config)]
    if getattr(cfg, "num_experts", 0):
        raise ConfigError(f"num_experts={cfg.num_experts} has no architecture here; try num_experts=0")  # pyright: ignore[reportAttributeAccessIssue]
    wrong = {family.model_type: family.lacks(cfg) for family in known}
    found = next((family for family in known if wrong[family.model_type] is None), None)
    if found is None:
        why = ", ".join(f"{name} has no {what}" for name, what in wrong.items())
        raise ConfigError(f"the model is of no architecture that can be written: {why}")
    return found


def config_json(cfg: ModelConfig) -> dict[str, Any]:
    """A config of ours as the keys of a config.json.

    Raises:
        ConfigError: See `family_for`.
    """
    family = family_for(cfg)
    head = {"architectures": [family.architecture], "model_type": family.model_type, "torch_dtype": cfg.param_dtype}
    return {**head, **family.write(cfg)}
