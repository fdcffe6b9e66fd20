"""What a checkpoint says about itself: one JSON object beside the arrays, sealed by a digest.

Reading it runs no code and believes nothing: a field that is missing, of another type or does not match the digest is a
`CheckpointError`.
"""

import dataclasses
import hashlib
import json
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import jaxpipe
from jaxpipe.errors import CheckpointError

FORMAT = "jaxpipe-checkpoint-1"
SHOWN_VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_KINDS: dict[Any, tuple[str, ...]] = {
    int: ("step", "row"),
    (int, float): ("time",),
    (int, float, type(None)): ("loss", "val_loss"),
    list: ("key",),
    dict: ("data", "config", "mesh", "leaves", "versions"),
    str: ("schedule",),
}
"""The types that fields must have."""


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
            int(np.prod(leaf["shape"], dtype=np.int64)) * np.dtype(_numpy_name(leaf["dtype"])).itemsize
            for leaf in self.leaves.values()
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
    if given.pop("digest", None) != _digest(given):
        raise CheckpointError(f"{where}: its description does not match its digest, it was changed or is damaged")
    given.pop("format")
    names = {spec.name for spec in dataclasses.fields(Meta)}
    if set(given) != names:
        raise CheckpointError(f"{where}: its description must hold {', '.join(sorted(names))}; it has {sorted(given)}")
    for kind, those in _KINDS.items():
        for name in those:
            if not isinstance(given[name], kind) or isinstance(given[name], bool):
                raise CheckpointError(f"{where}: {name}={given[name]!r} in its description is of another type")
    for name, leaf in given["leaves"].items():
        if not isinstance(leaf, dict) or set(leaf) != {"shape", "dtype", "sum"} or ".." in name.split("/"):
            raise CheckpointError(f"{where}: leaf {name!r} is not described by shape, dtype and sum")
    return Meta(**given)


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
