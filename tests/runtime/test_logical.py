"""An optimizer on the stacked tree does what it does on the model's separate layers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import toy_batch, toy_pipeline, tree_allclose
from hlo import hlo_text

from jaxpipe.errors import ConfigError


def decay_mask(params):
    """Decay matrices only: must see each layer's own ndim."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


OPTIMIZERS = {
    "adamw with clipping": optax.chain(
        optax.clip_by_global_norm(0.1), optax.adamw(1e-2, weight_decay=0.1, mask=decay_mask)
    ),
    "lamb": optax.lamb(1e-2),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=8),
    "apply_if_finite": optax.apply_if_finite(optax.adam(1e-2), 3),
    "multi_steps": optax.MultiSteps(
        optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)), 2
    ).gradient_transformation(),
    "adaptive_grad_clip": optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1, momentum=0.9)),
    "muon": optax.contrib.muon(1e-2),
    "schedule": optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 4)),
}


@pytest.fixture(scope="module")
def setting():
    """A tied model on 2 x 2 stages, its parameters, and three different gradients."""
    pipe = toy_pipeline("interleaved_1f1b", 2, 2, 2, tied=True)
    params = pipe.init(jax.random.key(0), toy_batch(4))
    step = jax.jit(pipe.value_and_grad)
    grads = []
    for seed in range(3):
        batch = toy_batch(4)
        batch["tokens"] = (batch["tokens"] + seed) % 12
        grads.append(jax.tree.map(lambda g, s=seed: g * 10**s, step(params, batch)[1]))
    return pipe, params, grads


def layers(pipe, tree):
    """The tree with a separate leaf for each layer."""
    canonical = jax.tree.map(np.asarray, pipe.to_canonical(tree))
    blocks = [jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), canonical["blocks"]["block"]) for i in range(4)]
    return {"embed": canonical["embed"], "blocks": blocks, "head": canonical["head"]}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_equal_those_of_separate_layers(setting, name):
    pipe, params, grads = setting
    tx, expected = pipe.optimizer(OPTIMIZERS[name]), layers(pipe, params)
    state, expected_state = tx.init(params), OPTIMIZERS[name].init(expected)
    update, expected_update = jax.jit(tx.update), jax.jit(OPTIMIZERS[name].update)
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
        updates, expected_state = expected_update(layers(pipe, grad), expected_state, expected)
        expected = optax.apply_updates(expected, updates)
    tree_allclose(layers(pipe, params), jax.tree.map(jnp.asarray, expected))


def test_moments_rest_where_their_parameters_do(setting):
    pipe, params, _ = setting
    state = pipe.optimizer(optax.adam(1e-2)).init(params)
    moments = jax.tree.map(lambda x: x.sharding.spec, state[0].mu)
    assert moments == jax.tree.map(lambda x: x.sharding.spec, params)


def test_no_layer_travels(setting):
    pipe, params, grads = setting
    tx = pipe.optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)))
    text = hlo_text(jax.jit(tx.update).lower(grads[0], tx.init(params), params).compile())
    assert not any(f" {name}(" in text for name in ("all-gather", "all-to-all", "collective-permute"))


def test_a_join_that_is_no_reduction_is_refused(setting):
    pipe, params, grads = setting

    def by_one_layer(updates: Any, _):
        return jax.tree.map(lambda x: x * updates["blocks"][0][0]["up"].mean(), updates)

    joined = optax.stateless(by_one_layer)
    with pytest.raises(ConfigError, match="joins several layers by 'mul'"):
        pipe.optimizer(joined).update(grads[0], pipe.optimizer(joined).init(params), params)
