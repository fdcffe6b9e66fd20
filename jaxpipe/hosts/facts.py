"""What must be the same in all processes of a run: its config, the packages, Python and the flags of XLA.

Processes that differ in any of it would compile different programs, and wait for each other for ever or, worse, not.
"""

import os
import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import jaxpipe
from jaxpipe.config.run import Config

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def facts_of(config: Config) -> dict[str, Any]:
    """Facts of this process: config keys, versions, flags; known before JAX starts."""
    keys = {
        f"{section}.{key}": list(value) if isinstance(value, tuple) else value
        for section, table in asdict(config).items()
        for key, value in table.items()
    }
    packages = {"jaxpipe": jaxpipe.__version__, **{name: version(name) for name in PACKAGES}}
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith("--xla_dump")]
    return {**keys, **packages, "python": platform.python_version(), "XLA_FLAGS": " ".join(sorted(flags))}
