"""Prints one line: this Python, and the versions that are installed beside it of what jaxpipe stands on."""

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version

NAMES = ("jax", "jaxlib", "jax-cuda12-plugin", "flax", "optax", "orbax-checkpoint", "numpy")


def main():
    """One line."""
    found = [f"Python {platform.python_version()}"]
    for name in NAMES:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    print("versions:", ", ".join(found), flush=True)


if __name__ == "__main__":
    main()
