"""What a checkpoint says about itself: one JSON object beside the arrays, sealed by a digest.

Reading it runs no code and believes nothing: a field that is missing, of another type or does not match the digest is a
`CheckpointError`.
"""

import dataclasses
import hashlib
import json
import math
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import jaxpipe
from jaxpipe.config import toml
from jaxpipe.documents import check_depth, shown
from jaxpipe.errors import CheckpointError, ConfigError
from jaxpipe.models.encdec_config import EncDecConfig
from jaxpipe.models.gpt_config import GPTConfig

ModelConfig = GPTConfig | EncDecConfig

FORMAT = "jaxpipe-checkpoint-1"
SHOWN_VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
LATEST = 1e11
"""Seconds since the epoch, far in the future and yet a date."""
MAX_DIMS, MAX_ELEMENTS = 16, 2**48
"""Of a leaf."""


@dataclass(frozen=True)
class Meta:
    """The facts of a checkpoint beside its arrays.

    Attributes:
        step: Optimizer steps taken.
        row: Position in the data: sequences of the data's order that were used or skipped, see `Batches.rows`.
        time: Seconds since the epoch at the save.
        loss: Training loss of the last step, None before the first.
        val_loss: Last validation loss, None before the first.
        key: The run's root random key, as words.
        data: What the data are: ``digest`` of the tokens, ``seed``, ``seq_len`` and ``windows`` of their order, and
            ``val_digest`` of the validation data.
        config: The resolved config, section by section.
        mesh: Devices by mesh axis.
        schedule: The schedule in words.
        leaves: By name of each canonical leaf its ``shape``, ``dtype`` and checksum ``sum``.
        versions: Of Python and of the libraries.
    """

    step: int
    row: int
    time: float
    loss: float | None
    val_loss: float | None
    key: list[int]
    data: dict[str, Any]
    config: dict[str, dict[str, Any]]
    mesh: dict[str, int]
    schedule: str
    leaves: dict[str, dict[str, Any]]
    versions: dict[str, str] = field(default_factory=lambda: versions())

    @property
    def bytes(self) -> int:
        """Bytes of all arrays."""
        import numpy as np

        return sum(
            math.prod(leaf["shape"]) * np.dtype(_numpy_name(leaf["dtype"])).itemsize for leaf in self.leaves.values()
        )

    def to_json(self) -> dict[str, Any]:
        """The facts with format and digest."""
        facts = {"format": FORMAT, **dataclasses.asdict(self)}
        return {**facts, "digest": _digest(facts)}


def from_json(facts: Any, where: str) -> Meta:
    """Reads what `Meta.to_json` wrote.

    Args:
        facts: Any value that JSON can hold.
        where: What messages call it.

    Raises:
        CheckpointError: It is something else, or was changed since.
    """
    if not isinstance(facts, dict) or not str(facts.get("format", "")).startswith("jaxpipe-checkpoint-"):
        raise CheckpointError(f"{where} is not a checkpoint of jaxpipe; name a run's folder or one of its checkpoints")
    if facts["format"] != FORMAT:
        raise CheckpointError(
            f"{where} has format {facts['format']!r} but this jaxpipe {jaxpipe.__version__} reads {FORMAT!r}; "
            "try the version that wrote it"
        )
    given = dict(facts)
    try:
        check_depth(given)
        whole = given.pop("digest", None) == _digest(given)
    except ValueError as error:  # NaN among them, which no digest is made of
        raise CheckpointError(f"{where}: its description is damaged: {error}") from error
    if not whole:
        raise CheckpointError(f"{where}: its description does not match its digest, it was changed or is damaged")
    given.pop("format")
    names = {spec.name for spec in dataclasses.fields(Meta)}
    if set(given) != names:
        raise CheckpointError(f"{where}: its description must hold {', '.join(sorted(names))}; it has {sorted(given)}")
    for name, holds in _RULES.items():
        if not holds(given[name]):
            raise CheckpointError(f"{where}: {name}={shown(given[name])} in its description is of another type")
    _check_leaves(given["leaves"], where)
    return Meta(**given)


def _check_leaves(leaves: dict[str, Any], where: str) -> None:
    paths = {tuple(name.split("/")) for name in leaves}
    for name, leaf in leaves.items():
        words = name.split("/")
        if not isinstance(leaf, dict) or set(leaf) != {"shape", "dtype", "sum"} or not all(map(_is_word, words)):
            raise CheckpointError(f"{where}: leaf {shown(name)} is not described by shape, dtype and sum")
        shape, fits = leaf["shape"], isinstance(leaf["shape"], list) and len(leaf["shape"]) <= MAX_DIMS
        if not fits or not all(map(_is_count, shape)) or math.prod(shape) > MAX_ELEMENTS:
            raise CheckpointError(f"{where}: leaf {shown(name)} has shape {shown(shape)}, which no array has")
        if not _is_dtype(leaf["dtype"]) or not isinstance(leaf["sum"], str):
            raise CheckpointError(f"{where}: leaf {shown(name)} has dtype {shown(leaf['dtype'])}, which no array has")
        if any(tuple(words[:count]) in paths for count in range(1, len(words))):
            raise CheckpointError(f"{where}: leaf {shown(name)} lies below another leaf")


def _is_word(word: str) -> bool:
    """Whether it is a name in a tree that is also one of a file."""
    return word not in ("", ".", "..") and word.isprintable()


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | bool | int) or _is_number(value)


def _is_table(value: Any) -> bool:
    """Whether it is a section of a config: scalars and lists of them."""
    return isinstance(value, dict) and all(
        all(map(_is_scalar, one)) if isinstance(one, list) else _is_scalar(one) for one in value.values()
    )


def _all_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(holds, value.values()))


def _is_dtype(name: Any) -> bool:
    import ml_dtypes  # noqa: F401  # its dtypes have names in numpy from now on
    import numpy as np

    if not isinstance(name, str) or not re.fullmatch(r"(u?int|b?float|complex|bool)[a-z0-9_]*", name):
        return False
    try:
        return np.dtype(name).itemsize > 0
    except TypeError:
        return False


_RULES: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "row": _is_count,
    "time": lambda value: _is_number(value) and 0 <= value < LATEST,
    "loss": lambda value: value is None or _is_number(value),
    "val_loss": lambda value: value is None or _is_number(value),
    "key": lambda value: isinstance(value, list) and len(value) < 9 and all(_is_count(n) and n < 2**32 for n in value),
    "data": _is_table,
    "config": _all_of(_is_table),
    "mesh": _all_of(_is_count),
    "schedule": lambda value: isinstance(value, str),
    "leaves": lambda value: isinstance(value, dict),
    "versions": _all_of(lambda value: isinstance(value, str)),
}
"""What fields must hold."""


def versions() -> dict[str, str]:
    """Versions of Python, jaxpipe and the libraries that decide about numbers."""
    return {
        "python": platform.python_version(),
        "jaxpipe": jaxpipe.__version__,
        **{name: version(name) for name in SHOWN_VERSIONS},
    }


def _numpy_name(dtype: str) -> str:
    return "uint16" if dtype == "bfloat16" else dtype


def _digest(facts: dict[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def model_of(meta: Meta, where: Any) -> ModelConfig:
    """The model of a checkpoint.

    Raises:
        CheckpointError: Its description has none that this jaxpipe knows.
    """
    table = {key: value for key, value in meta.config.get("model", {}).items() if value is not None}
    kind = EncDecConfig if "num_encoder_layers" in table else GPTConfig
    try:
        return kind(**toml.check({"model": table}, {"model": toml.fields_of(kind)})["model"])
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{where}: its model is not one that this jaxpipe knows: {error}") from error
