"""Reading a config.json strictly: what decides about numbers is understood or refused, what is not known is named."""

import difflib
from collections.abc import Mapping
from typing import Any

from jaxpipe.errors import ConfigError
from jaxpipe.models.hf.keys import Keys

_MISSING = object()

CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""Keys that our configs do not have and that go from a folder to the one written back."""


class Facts:
    """A config.json whose keys are taken one by one.

    Args:
        table: The keys.
        where: What messages call the file.
        keys: What becomes of them.

    Raises:
        ConfigError: Two names of one thing have different values.
    """

    def __init__(self, table: Mapping[str, Any], where: str, keys: Keys):
        self._table, self._where, self._keys = table, where, keys
        self.seen: set[str] = set()
        for alias, key in keys.aliases.items():
            if alias in table and table[alias] != table.get(key):
                raise self.error(
                    f"{alias}={table[alias]!r} names the same as {key}={table.get(key)!r}; make them equal"
                )

    def __contains__(self, key: str) -> bool:
        """Whether the file says something of a key, if only null."""
        return key in self._table

    def take(self, key: str, kind: type, otherwise: Any = _MISSING) -> Any:
        """The value of a key; null and a missing key are `otherwise`.

        Raises:
            ConfigError: There is none, or it is of another type.
        """
        self.seen.add(key)
        value = self._table.get(key)
        if value is None:
            if otherwise is _MISSING:
                raise ConfigError(f"{self._where} has no {key!r}, which its architecture needs")
            return otherwise
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise ConfigError(f"{self._where}: {key}={value!r} must be of type {kind.__name__}")
        return value

    def choose(self, key: str, choices: Mapping[str, Any], otherwise: str) -> Any:
        """What one of the supported values of a key stands for.

        Raises:
            ConfigError: The value is none of them.
        """
        value = self.take(key, str, otherwise)
        if value not in choices:
            near = difflib.get_close_matches(value, choices, n=1, cutoff=0.0)
            raise ConfigError(
                f"{self._where}: {key}={value!r} is not supported; it must be one of {', '.join(map(repr, choices))}, "
                f"such as {near[0]!r}"
            )
        return choices[value]

    def must(self, key: str, value: Any, *same: Any) -> None:
        """Refuses any value of a key but this one; a missing key is it, and so are `same`.

        Raises:
            ConfigError: It has another.
        """
        self.seen.add(key)
        found = self._table.get(key, value)
        if found not in (value, *same):
            raise ConfigError(f"{self._where}: {key}={found!r} is not supported; it must be {value!r}")

    def end(self) -> None:
        """Refuses keys that nobody took.

        Raises:
            ConfigError: There is one that might change numbers.
        """
        known = self.seen | self._keys.idle | set(self._keys.aliases)
        for key, value in self._table.items():
            if key in known or key.startswith("_") or value is None:
                continue
            if key == "quantization_config":
                raise ConfigError(f"{self._where}: {key} is not supported; try the weights that are not quantized")
            raise ConfigError(
                f"{self._where}: unknown key {key}={value!r}; if it changes no number of the model, delete it there"
            )

    def error(self, text: str) -> ConfigError:
        """An error about the file."""
        return ConfigError(f"{self._where}: {text}")
