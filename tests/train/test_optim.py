"""The default optimizer against its definition."""

from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from jaxpipe.config.sections import OptimConfig
from jaxpipe.train.optim import adamw, decays, learning_rate


def test_learning_rate_warms_up_then_falls_to_the_last():
    rate: Any = learning_rate(OptimConfig(learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=10), steps=100)
    values = [float(rate(step)) for step in range(101)]
    assert values[0] > 0
    assert np.argmax(values) == 10
    assert all(a < b for a, b in pairwise(values[:11]))
    assert all(a > b for a, b in pairwise(values[10:]))
    np.testing.assert_allclose([values[10], values[55], values[100]], [1e-3, 5.5e-4, 1e-4], rtol=1e-5)


def test_a_run_shorter_than_the_warm_up_is_all_warm_up():
    rate: Any = learning_rate(OptimConfig(warmup_steps=100), steps=5)
    assert 0 < float(rate(0)) < float(rate(4)) < 6e-4


def test_only_matrices_decay():
    params = {"kernel": jnp.ones((2, 3)), "scale": jnp.ones(3), "gain": jnp.ones(())}
    assert decays(params) == {"kernel": True, "scale": False, "gain": False}
    config = OptimConfig(learning_rate=0.1, final_learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    tx = adamw(config, steps=1)
    zeros = {name: jnp.zeros_like(leaf) for name, leaf in params.items()}
    updates: Any = tx.update(zeros, tx.init(params), params)[0]
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5 * np.ones((2, 3)), rtol=1e-6)
    assert not updates["scale"].any()
    assert not updates["gain"].any()


def first_moment(clip_norm):
    """What AdamW's first moment holds after one gradient of norm 5."""
    params = {"a": jnp.zeros(2)}
    tx = adamw(OptimConfig(clip_norm=clip_norm, beta1=0.0), steps=10)
    _, state = tx.update({"a": jnp.array([3.0, 4.0])}, tx.init(params), params)
    return optax.tree.get(state, "mu")["a"]


def test_clipping_bounds_the_global_norm():
    np.testing.assert_allclose(first_moment(1.0), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(first_moment(10.0), [3.0, 4.0], rtol=1e-6)


def test_no_clipping_when_off():
    np.testing.assert_allclose(first_moment(0.0), [3.0, 4.0], rtol=1e-6)
