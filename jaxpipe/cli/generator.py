"""The options of `jaxpipe generate` and `jaxpipe serve` that say where a model runs and how much of it fits."""

import argparse
import re
from typing import TYPE_CHECKING, Any

from jaxpipe.errors import ConfigError

if TYPE_CHECKING:
    from jaxpipe.infer import Generator
    from jaxpipe.infer.load import Loaded

MAX_LEN = 4096
"""Tokens per sequence of a server whose model could hold more, unless --max-len says so: caches grow with it."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "model", metavar="CHECKPOINT|HF_DIR", help="a checkpoint, a run's folder, or a model's folder of Hugging Face"
    )
    group = parser.add_argument_group("devices", "by default all there are")
    group.add_argument("--pipe", type=int, metavar="P", help="devices that share the layers")
    group.add_argument("--repeats", type=int, metavar="V", default=1, help="stages per device, by default 1")
    group.add_argument("--data", type=int, metavar="N", help="copies of the pipeline, each with sequences of its own")
    group.add_argument("--tensor", type=int, metavar="N", default=1, help="devices that share each matrix product")
    group.add_argument("--simulate", type=int, metavar="N", help="run on so many simulated CPU devices")
    group.add_argument("--chunk", type=int, metavar="C", default=64, help="tokens of a prompt per tick, by default 64")
    group.add_argument("--cache-dtype", metavar="TYPE", help="of keys and values, such as bfloat16")


def check(options: argparse.Namespace, **least: int) -> None:
    """Raises ConfigError for a number that is too small.

    Args:
        options: From the parser.
        least: For options by name, the least they may be.
    """
    common = {"pipe": 1, "repeats": 1, "data": 1, "tensor": 1, "simulate": 1, "chunk": 1}
    for name, low in {**common, **least}.items():
        value = getattr(options, name)
        if value is not None and value < low:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least {low}; try {low}")
    known = ("float32", "bfloat16", "float16")
    if options.cache_dtype not in (None, *known):
        raise ConfigError(f"--cache-dtype {options.cache_dtype!r} must be one of {', '.join(known)}; try bfloat16")


def load(options: argparse.Namespace) -> "Loaded":
    """The model that the options name. Simulates devices where they say so."""
    from jaxpipe.infer.load import load_model
    from jaxpipe.runtime.layout.mesh import simulate_devices

    if options.simulate:
        simulate_devices(options.simulate)
    return load_model(options.model)


def build(options: argparse.Namespace, loaded: "Loaded", *, slots: int, **lengths: Any) -> "Generator":
    """Puts the model on its devices. Its weights are in the generator then, and no more in `loaded`.

    Args:
        options: From the parser.
        loaded: The model.
        slots: Answers at a time, at least.
        lengths: Options of `Generator` that say how long prompts and answers may be.

    Raises:
        ConfigError: They do not fit the model or the devices.
    """
    import jax

    from jaxpipe.infer import Generator
    from jaxpipe.infer.model import decoder_of
    from jaxpipe.runtime.layout.mesh import make_mesh

    layers = len(decoder_of(loaded.cfg).kinds) // options.repeats
    free = max(1, len(jax.devices()) // options.tensor)
    pipe, data = spread(max(1, layers), free, options.pipe, options.data)
    try:
        mesh = make_mesh(pipe=pipe, data=data, tensor=options.tensor)
    except ConfigError as error:
        raise ConfigError(re.sub(r"mesh\.(\w+)=", r"--\1 ", str(error))) from error
    generator = Generator(
        loaded.cfg,
        loaded.canonical,
        mesh=mesh,
        repeats=options.repeats,
        rows=-(-slots // (pipe * data)),
        chunk=options.chunk,
        cache_dtype=options.cache_dtype,
        **lengths,
    )
    loaded.canonical.clear()  # the generator has them in its own layout: not twice in memory
    return generator


def spread(layers: int, devices: int, pipe: int | None = None, data: int | None = None) -> tuple[int, int]:
    """Devices for the pipeline, and copies of it: most tokens per second, and of those the least memory.

    A pipeline is as fast as its slowest stage, so its share of the work is ``ceil(layers / pipe)`` layers.

    Args:
        layers: Of the model.
        devices: That there are.
        pipe: As given.
        data: As given.

    Example:
        >>> spread(12, 8), spread(12, 4), spread(32, 8), spread(2, 8), spread(12, 8, pipe=2)
        ((4, 2), (4, 1), (8, 1), (2, 4), (2, 4))
    """
    if pipe is not None:
        return pipe, data or max(1, devices // pipe)
    if data is not None:
        return max(1, min(layers, devices // data)), data
    shapes = [(size, devices // size) for size in range(1, min(layers, devices) + 1)] or [(1, 1)]
    return max(shapes, key=lambda shape: (shape[1] / -(-layers // shape[0]), shape[0]))
