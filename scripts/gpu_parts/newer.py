"""What flax misses in some versions of JAX."""

import sys


def import_nnx() -> str:
    """Imports `flax.nnx`; where `jax.experimental.hijax` lacks names that it wants (jax 0.11), gives it stand-ins.

    They serve types that the check does not use: variables of mutable hijax types.

    Returns:
        What was done, for people; empty where nothing had to be.
    """
    try:
        import flax.nnx  # pyright: ignore[reportUnusedImport]
    except (ImportError, AttributeError) as error:
        from jax.experimental import hijax

        missing = [name for name in ("HiPrimitive", "MutableHiType") if not hasattr(hijax, name)]
        if not missing:
            raise
        for name in missing:
            setattr(hijax, name, _Primitive if name == "HiPrimitive" else hijax.HiType)
        for name in [name for name in sys.modules if name == "flax" or name.startswith("flax.")]:
            del sys.modules[name]  # half imported
        import flax.nnx  # noqa: F401  # pyright: ignore[reportUnusedImport]

        return f"flax.nnx with stand-ins for hijax.{' and hijax.'.join(missing)} ({error})"
    return ""


class _Primitive:
    """Stands for `hijax.HiPrimitive` where that is missing."""

    def __init__(self, name: str):
        self.name = name

    def bind(self, *args, **params):
        raise NotImplementedError(f"{self.name}: this JAX has no hijax.HiPrimitive")
