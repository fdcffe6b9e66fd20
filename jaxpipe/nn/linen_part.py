"""One Linen module as two functions: what makes its parameters, and what calls it with them."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import core, errors, linen as nn
from jax.sharding import AbstractMesh

from jaxpipe.errors import ConfigError
from jaxpipe.runtime.layout.tree import Tree
from jaxpipe.runtime.model import Specs


@dataclass(frozen=True)
class LinenPart:
    """One module as two functions, see `jaxpipe.nn.parts.Part`.

    Attributes:
        name: What errors call it.
        module: The module, unbound.
        make: ``(module, *inputs)``, a call that makes the parameters.
        call: ``(module, *inputs, deterministic)``.
        streams: Names of its random streams.
        specs: Which dims of its parameters lie on the mesh axis `tensor`.
        advice: What an error says of a random stream that is drawn from in a call without a key.
    """

    name: str
    module: nn.Module
    make: Callable[..., Any]
    call: Callable[..., Any]
    streams: tuple[str, ...]
    specs: Specs = field(default_factory=dict, hash=False)
    advice: str = "try passing on what its call function gets as deterministic"

    def init(self, key, *inputs) -> dict[str, Any]:
        """The parameters of a new module, the numbers of ``module.init(key, …)``."""
        with _no_mesh():
            return core.meta.unbox(self.variables(key, *inputs))["params"]

    def variables(self, key, *inputs) -> dict[str, Any]:
        """The same as ``{"params": …}``, each in the box of metadata that the module gave it.

        Raises:
            ConfigError: The module has another collection.
        """
        rngs = {**self._rngs(key), "params": key}
        with _no_mesh():
            variables: Any = core.unfreeze(self.module.init(rngs, *inputs, method=self.make))
            params = variables.pop("params", {})
            _refuse_state(self.name, core.meta.unbox(variables))
        return {"params": params}

    def apply(self, params, key, *inputs):
        """Calls the module with these parameters, and with random streams from `key`."""
        deterministic = key is None
        rngs = None if deterministic else self._rngs(key)
        try:
            return self.module.apply({"params": params}, *inputs, deterministic, rngs=rngs, method=self.call)
        except errors.InvalidRngError as error:
            stream = re.search('needs PRNG for "(.*?)"', str(error))
            if stream is None:
                raise
            raise ConfigError(self._missing(stream[1], deterministic)) from error

    def _rngs(self, key) -> dict[str, Any]:
        return {name: jax.random.fold_in(key, number) for number, name in enumerate(self.streams)}

    def _missing(self, stream: str, deterministic: bool) -> str:
        draws = f"{self.name} draws from the random stream {stream!r}"
        if deterministic:
            return f"{draws} in a call without a key; {self.advice}"
        return f"{draws} but rngs={self.streams}; try rngs={(*self.streams, stream)}"


def call_with_flag(module, x: Tree, *inputs: Tree, deterministic: bool):
    """Calls a module, with `deterministic`, or turned round `train` or `training`, if its ``__call__`` takes that."""
    takes = {parameter.name for parameter in parameters(module)}
    return module(x, *inputs, **{name: flag for name, flag in flags(deterministic).items() if name in takes})


def flags(deterministic: bool) -> dict[str, bool]:
    """The parameters of a ``__call__`` that say whether it is deterministic."""
    return {"deterministic": deterministic, "train": not deterministic, "training": not deterministic}


def parameters(module: nn.Module) -> list[inspect.Parameter]:
    """What its ``__call__`` takes besides the module."""
    return list(inspect.signature(type(module).__call__).parameters.values())[1:]


def _no_mesh():
    """Within a mesh, Flax would place what is annotated, on axes that the pipeline's mesh need not have."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))


def _refuse_state(name: str, collections: dict[str, Any]):
    """Raises for the first leaf that is not a parameter."""
    for path, _ in jax.tree.leaves_with_path(collections):
        keys = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
        raise ConfigError(
            f"{name}.{'/'.join(keys)} is in the collection {keys[0]!r}, but a pipeline's modules may hold only "
            "'params'; try computing it in __call__, returning a loss instead of sowing it, or a layer without state "
            "(LayerNorm for BatchNorm)"
        )
