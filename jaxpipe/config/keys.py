"""Errors of the library in the words of a config: the library names its arguments, a config has keys for them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from jaxpipe.errors import JaxpipeError

KEYS = {
    "num_layers": "model.num_layers",
    "devices": "mesh.pipe",
    "shard": "mesh.shard",
    "schedule": "schedule.name",
    "second_stream": "gpu.second_stream",
    **{
        name: f"schedule.{name}"
        for name in ("microbatches", "repeats", "stages", "remat", "scan_blocks", "head", "idle", "packing", "memory")
    },
}
"""The key of each argument of `build` and `Pipeline`, and of the model's depth."""

_ARGUMENT = re.compile(rf"(?<![\w.])({'|'.join(KEYS)})=(?=\S)")


@contextmanager
def in_keys() -> Iterator[None]:
    """While entered, an error that names an argument ``num_layers=7`` names its key ``model.num_layers=7``."""
    try:
        yield
    except JaxpipeError as error:
        error.args = tuple(
            _ARGUMENT.sub(lambda found: f"{KEYS[found[1]]}=", part) if isinstance(part, str) else part
            for part in error.args
        )
        raise
