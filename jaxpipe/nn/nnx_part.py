"""One NNX module as two functions: what makes its parameters, and what calls it with given ones."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import spmd
from jax.sharding import NamedSharding, PartitionSpec

from jaxpipe.errors import ConfigError
from jaxpipe.flax_nnx import nnx
from jaxpipe.runtime.layout.mesh import TENSOR
from jaxpipe.runtime.layout.tree import Tree

Factory = Callable[[nnx.Rngs], nnx.Module]
"""Makes a module from random streams."""

BlockCall = Callable[[Any, Tree, Tree], Any]
"""``(module, carry, mb) -> carry``, or ``-> (carry, aux)`` with a scalar that joins the loss."""


class NNXPart:
    """One module as two functions: `init` makes its parameters, `apply` calls it with given ones."""

    def __init__(self, name: str, factory: Factory, call: Callable[..., Any]):
        self.name, self.factory, self.call = name, factory, call
        graphdef: Any = None

        def split():
            nonlocal graphdef
            graphdef, *states = nnx.split(self._make(nnx.Rngs(0)), nnx.Param, nnx.RngState, ...)
            return states

        params, streams, rest = (list(nnx.to_flat_state(state)) for state in jax.eval_shape(split))
        _refuse_state(name, graphdef, rest)
        self.graphdef, self.params, self.streams = graphdef, params, streams
        self.specs = {"/".join(map(str, path)): spec for path, v in params if (spec := _tensor_spec(v))}

    def init(self, key, *inputs) -> dict[str, Any]:
        """The parameters of a new module, as nested dicts with string keys; they do not depend on its inputs."""
        return params_of(self._make(nnx.Rngs(key)))

    def apply(self, params, key, *inputs):
        """Calls the module with these parameters, and with random streams from `key`."""
        # A leaf that stays cut by vocabulary is not here; whoever reads it in spite of that finds no row.
        state = [(path, variable.replace(_at(params, path, variable))) for path, variable in self.params]
        module = nnx.merge(self.graphdef, nnx.from_flat_state(state + self._seeded(key)))
        if key is None:
            module.eval()
        return self.call(module, *inputs)

    def _make(self, rngs: nnx.Rngs):
        """The module; where its parameters are placed is up to the pipeline, not to annotations in the module."""
        with nnx.use_eager_sharding(False):
            return self.factory(rngs)

    def _seeded(self, key) -> list:
        """The random streams with their counts at zero and a key of their own each."""
        base = jax.random.key(0) if key is None else key
        if not jnp.issubdtype(base.dtype, jax.dtypes.prng_key):
            base = jax.random.wrap_key_data(base)
        state = []
        for number, (path, variable) in enumerate(self.streams):
            like = variable.get_value()
            if isinstance(variable, nnx.RngKey):
                value = jax.random.fold_in(base, number)
                value = jax.random.split(value, like.shape) if like.shape else value
            else:
                value = jnp.zeros(like.shape, like.dtype)
            state.append((path, variable.replace(value)))
        return state


def block_part(kind: str, factory: Factory, block_call: BlockCall | None) -> NNXPart:
    """A block, called with the carry and `mb`, or with the carry alone."""
    return NNXPart(kind, factory, block_call or (lambda module, carry, mb: module(carry)))


def params_of(module: nnx.Module) -> dict[str, Any]:
    """The parameters of a module, as nested dicts with string keys."""
    tree: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        *parents, leaf = map(str, path)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = variable.get_value()
    return tree


def _tensor_spec(variable: nnx.Variable) -> PartitionSpec | None:
    """What a parameter's annotation says of the axis `tensor`; other axes are the pipeline's to use."""
    metadata = variable.get_metadata()
    names: Any = metadata.get("out_sharding")
    if not names:
        return None
    names = spmd.get_pspec(names, metadata.get("sharding_rules"))
    names = names.spec if isinstance(names, NamedSharding) else names
    cut = [TENSOR if TENSOR in (name if isinstance(name, tuple) else (name,)) else None for name in names]
    return PartitionSpec(*cut) if TENSOR in cut else None


def _at(params, path, like):
    for name in path:
        if str(name) not in params:
            return jnp.zeros((0, *like.get_value().shape[1:]), like.get_value().dtype)
        params = params[str(name)]
    return params


def _refuse_state(name: str, graphdef, rest: list):
    """Raises for the first leaf that is neither a parameter nor a random stream."""
    found = [(".".join(map(str, path)), leaf) for path, leaf in rest]
    # Made while tracing, an array that is a bare attribute ends up in the structure.
    bare = [(key, getattr(at, "value", None)) for key, at in graphdef.attributes]
    found += [(key, value) for key, value in bare if isinstance(value, jax.Array)]
    if found:
        path, leaf = found[0]
        kind = type(leaf).__name__ if isinstance(leaf, nnx.Variable) else "array"
        raise ConfigError(
            f"{name}.{path} is of type {kind}, but a pipeline's modules may hold only nnx.Param and random streams; "
            "try computing it in __call__, or a layer without state (LayerNorm for BatchNorm)"
        )
