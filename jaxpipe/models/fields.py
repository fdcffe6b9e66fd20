"""The rules that the fields of every model's config obey, written once: choices, least values, dtypes by name."""

import difflib
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_type_hints

import jax.numpy as jnp

from jaxpipe.documents import shown
from jaxpipe.errors import ConfigError

DType = Literal["float32", "bfloat16", "float16", "float64"]
"""What a model may compute in."""

WideDType = Literal["float32", "bfloat16", "float64"]
"""Those with the range of float32 or more: what weights may rest in, lest an optimizer's small numbers become zero."""


MAX_SIZE, MAX_LAYERS = 2**31 - 1, 10_000
"""The most that any number of a model may be, and its layers, of which there are lists."""


def nearest(value: Any, choices: Sequence[str]) -> str:
    """What to suggest for a value that is none of the choices: one that is spelled alike, else the one that decides."""
    found = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.6 if "auto" in choices else 0.0)
    return found[0] if found else "auto"


def check_fields(cfg: Any, **least: int) -> None:
    """Checks every field of a config by its annotation, and turns dtypes into their names.

    A `Literal` must hold one of its choices, an ``int`` be at least 1; ``dropout`` must be a probability below 1.

    Args:
        cfg: A frozen dataclass with fields ``dtype``, ``param_dtype`` and ``dropout``.
        least: The least value of an ``int`` field that may be another than 1.

    Raises:
        ConfigError: The first field that breaks its rule.
    """
    for name in ("dtype", "param_dtype"):  # jnp.bfloat16 is as good as "bfloat16"
        if not isinstance(value := getattr(cfg, name), str):
            object.__setattr__(cfg, name, jnp.dtype(value).name)
    for name, hint in get_type_hints(type(cfg)).items():
        value, choices = getattr(cfg, name), get_args(hint)
        if str in map(type, choices) and value not in choices:
            near = nearest(value, choices)
            raise ConfigError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}; try {near!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}={value} must be finite; try 1.0")
        most = MAX_LAYERS if name.endswith("_layers") else MAX_SIZE
        if type(value) is int and value > most:
            raise ConfigError(f"{name}={shown(value)} must be at most {most}; try {most}")
        if hint is int and value < (bound := least.get(name, 1)):
            raise ConfigError(f"{name}={value} must be at least {bound}; try {bound}")
    if not 0.0 <= cfg.dropout < 1.0:
        raise ConfigError(f"dropout={cfg.dropout} must be at least 0 and below 1; try 0.1")


def check_above_zero(cfg: Any, **tries: float) -> None:
    """Checks that fields are positive.

    Args:
        cfg: A config.
        tries: A value to suggest, by field.

    Raises:
        ConfigError: The first field that is not.
    """
    for name, near in tries.items():
        if not getattr(cfg, name) > 0:
            raise ConfigError(f"{name}={getattr(cfg, name)} must be above 0; try {near}")
