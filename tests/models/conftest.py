"""Models with random weights, made without compiling their initialisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpipe.models.encdec import EncDec, EncDecConfig
from jaxpipe.models.gpt import GPT, GPTConfig


def fill(shapes):
    """Random arrays for shapes, far from the neutral start also in biases and scales; keys and counts start at 0."""
    rng = np.random.default_rng(0)

    def one(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        value = rng.normal(0.1, 0.4, x.shape) if jnp.issubdtype(x.dtype, jnp.floating) else np.zeros(x.shape)
        return jnp.asarray(value, x.dtype)

    return jax.tree.map(one, shapes)


@functools.cache
def make(cls, cfg):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: cls(cfg, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, fill(state))


def make_gpt(cfg: GPTConfig) -> GPT:
    return make(GPT, cfg)


def make_encdec(cfg: EncDecConfig) -> EncDec:
    return make(EncDec, cfg)


@pytest.fixture
def random_gpt():
    """``cfg -> GPT``."""
    return make_gpt


@pytest.fixture
def random_encdec():
    """``cfg -> EncDec``."""
    return make_encdec


@pytest.fixture
def random_like():
    """``tree of shapes -> tree of arrays``."""
    return fill
