"""What was measured of a model's blocks: what `jaxpipe profile` writes, `jaxpipe plan --costs` reads."""

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from jaxpipe.config import toml
from jaxpipe.config.run import Config
from jaxpipe.documents import read_object
from jaxpipe.errors import ConfigError
from jaxpipe.measure.planning import gpt_shape
from jaxpipe.plan import ModelCosts, Space

VERSION = 3


@dataclass(frozen=True)
class Profile:
    """What was measured.

    Attributes:
        device: Name of the device in `jaxpipe.plan.DEVICES`.
        kind: What JAX calls it.
        cores: Cores that its devices share, for CPUs.
        fields: The model's own options and the sequence length.
        costs: By rows of a microbatch.
        hops: (bytes, seconds) of a hop, smallest first; empty where there was one device only.
        traffic_bytes_per_s: What elementwise work reaches of the memory's bandwidth.
    """

    device: str
    kind: str
    cores: int | None
    fields: dict[str, Any]
    costs: dict[int, ModelCosts]
    hops: tuple[tuple[float, float], ...]
    traffic_bytes_per_s: float

    def hop_s(self, size_bytes: float) -> float | None:
        """Seconds of a hop, between the measured sizes by a straight line; None if none was measured."""
        if not self.hops:
            return None
        sizes = [size for size, _ in self.hops]
        at = min(max(1, bisect_left(sizes, size_bytes)), len(sizes) - 1)
        (a, s), (b, t) = self.hops[at - 1], self.hops[at]
        return max(0.0, s + (t - s) * (size_bytes - a) / (b - a))

    def within(self, space: Space) -> Space:
        """What may be chosen, without what was not measured."""
        known = {remat for costs in self.costs.values() for block in costs.blocks.values() for remat in block.times}
        rows = [count for count in self.costs if space.rows is None or count in space.rows]
        remats = [remat for remat in space.remats if remat in known]
        return replace(space, rows=rows, remats=remats, tensor=space.tensor or (1,))

    def costing(self, config: Config, path: str) -> Callable[[int, int], ModelCosts]:
        """The costs for a config's microbatches.

        Args:
            config: What is planned for.
            path: Of the profile, for messages.

        Raises:
            ConfigError: The profile is of another model, or has no microbatches of the size asked for.
        """
        wanted = plain_fields(gpt_shape(config.model, config.train.seq_len).fields)
        # [1] The number of blocks is no property of a block.
        names = [name for name in wanted if name != "num_layers" and self.fields.get(name) != wanted[name]]
        if names:
            listed = ", ".join(f"{name}={self.fields.get(name)!r} (here {wanted[name]!r})" for name in names)
            raise ConfigError(f"profile {path} is of another model: {listed}; try jaxpipe profile CONFIG --out {path}")

        def of(rows: int, tensor: int) -> ModelCosts:
            if rows not in self.costs or tensor != 1:
                raise ConfigError(
                    f"profile {path} has microbatches of {', '.join(map(str, self.costs))} rows on one device, not "
                    f"rows={rows} with tensor={tensor}; try jaxpipe profile CONFIG --rows {rows}"
                )
            costs = self.costs[rows]
            return replace(costs, hop_s=self.hop_s(costs.carry_bytes))

        return of

    def to_json(self) -> str:
        """The file's text."""
        table = asdict(self) | {"version": VERSION, "costs": {rows: asdict(cost) for rows, cost in self.costs.items()}}
        return json.dumps(table, indent=1)


def read_profile(path: str | Path) -> Profile:
    """Reads what `Profile.to_json` wrote.

    Raises:
        ConfigError: The file is missing, or no profile.
    """
    try:
        table = read_object(path, ConfigError)
    except ConfigError as error:
        raise ConfigError(f"profile {error}; try jaxpipe profile CONFIG --out {path}") from error
    try:
        if (version := table.pop("version")) != VERSION:
            raise ConfigError(
                f"profile {path} has version {version}, and this jaxpipe reads {VERSION}; try "
                f"jaxpipe profile CONFIG --out {path}"
            )
        profile = _typed(Profile, table)
        sizes = [size for size, _ in profile.hops]
        if len(sizes) == 1 or sizes != sorted(set(sizes)):
            raise ValueError(sizes)
        return profile
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"profile {path} is not what `jaxpipe profile` writes; try jaxpipe profile CONFIG --out {path}"
        ) from error


def _typed(kind: Any, value: Any) -> Any:
    """A JSON value as a type: a dataclass, what it holds, and numbers that times, sizes and counts can be.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: It is none.
    """
    inner = get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _typed(hints[name], own) for name, own in value.items()})
    if get_origin(kind) in (dict, Mapping):
        keys, values = inner
        return {int(key) if keys is int else _typed(keys, key): _typed(values, own) for key, own in value.items()}
    if get_origin(kind) is tuple:
        kinds = inner[:1] * len(value) if inner[-1] is ... else inner
        return tuple(_typed(own, one) for own, one in zip(kinds, value, strict=True))
    if kind is Any or (value is None and type(None) in inner):
        return value
    value = toml.convert(value, kind, "")
    if not isinstance(value, str) and value < 0:
        raise ValueError(value)
    return value


def plain_fields(fields: Any) -> dict[str, Any]:
    """A model's own options as JSON has them."""
    return json.loads(json.dumps(dict(fields)))
