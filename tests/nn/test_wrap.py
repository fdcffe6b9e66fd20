"""A user's own NNX model in a pipeline, and back: equal to the same model without one."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import QUICK, token_loss, toy_batch, tree_allclose

import jaxpipe as jp
from jaxpipe.errors import ConfigError, PartitionError
from jaxpipe.nn import from_nnx
from jaxpipe.schedule import build

VOCAB, WIDTH, MICROBATCHES = 12, 8, 4
BATCH = toy_batch(8)


class Scale(nnx.Param):
    """A parameter of a type of the user's own."""


class Layer(nnx.Module):
    def __init__(self, rngs, dropout=0.0, width=WIDTH, gate=jnp.tanh):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, width, rngs=rngs), nnx.Linear(width, WIDTH, rngs=rngs)
        self.scale = Scale(jnp.full(WIDTH, 0.5), group="scales")
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.act = functools.partial(jnp.multiply, 2.0)
        self.gate = lambda x: gate(x)

    def __call__(self, x):
        return x + self.dropout(self.down(self.gate(self.act(self.up(self.norm(x)))))) * self.scale[...][None, None]


class Decoder(nnx.Module):
    def __init__(self, layers, rngs):
        self.layers = layers
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)


class Transformer(nnx.Module):
    """Tied embedding, blocks two attributes deep, a final norm and a bias of its own."""

    def __init__(self, layers=4, dropout=0.0, make_layers=nnx.List, layer=Layer, positions=5, seed=0):
        rngs = nnx.Rngs(seed)
        self.table = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.positions = nnx.Param(0.1 * rngs.params.normal((positions, WIDTH)))
        self.decoder = Decoder(make_layers([layer(rngs, dropout) for _ in range(layers)]), rngs)
        self.bias = nnx.Param(jnp.zeros(VOCAB), note="kept")

    def embed(self, tokens):
        return self.table(tokens) + self.positions[None]

    def head(self, x):
        return self.table.attend(self.decoder.norm(x)) + self.bias[None, None]

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.decoder.layers:
            x = layer(x)
        return self.head(x)


def wrap(module, **options):
    return from_nnx(
        module,
        **{
            "blocks": "decoder.layers",
            "embed": lambda m, mb: m.embed(mb["tokens"]),
            "head": lambda m, x, mb: m.head(x),
            "loss": token_loss,
            "batch": BATCH,
            **options,
        },
    )


def by_hand(module):
    """The mean loss of the user's model, unwrapped."""
    loss, weight = token_loss(module(BATCH["tokens"]), BATCH)
    return loss / weight


def pipeline(wrapped, devices, repeats=1, **options):
    name = "interleaved_1f1b" if repeats > 1 else "1f1b"
    schedule = build(name, devices=devices, microbatches=MICROBATCHES, repeats=repeats)
    return jp.Pipeline(wrapped.model, schedule=schedule, mesh=jp.make_mesh(devices), **options)


def unwrapped(module, loss=by_hand):
    """Loss and gradients of the user's model, by `nnx.value_and_grad`."""
    graphdef, state = nnx.split(module)
    run = jax.jit(lambda state: nnx.value_and_grad(loss)(nnx.merge(graphdef, state)), compiler_options=QUICK)
    value, grads = run(state)
    return value, nnx.to_pure_dict(grads)


def params(module):
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


@pytest.mark.parametrize(("devices", "repeats"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_loss_and_gradients_equal_those_of_the_model_itself(devices, repeats):
    module = Transformer(layers=8 if devices * repeats == 8 else 4)
    wrapped = wrap(module)
    pipe = pipeline(wrapped, devices, repeats)
    step = jax.jit(pipe.value_and_grad, compiler_options=QUICK)
    loss, grads = step(pipe.from_canonical(wrapped.canonical()), BATCH)
    expected, expected_grads = unwrapped(module)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    tree_allclose(params(wrapped.write_back(pipe.to_canonical(grads))), expected_grads)


def test_two_optimizer_steps_and_back_equal_those_of_the_model_itself():
    module, tx = Transformer(), optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2))
    wrapped = wrap(module)
    pipe = pipeline(wrapped, devices=2)
    optimizer = pipe.optimizer(tx)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(weights, moments):
        _, grads = pipe.value_and_grad(weights, BATCH)
        updates, moments = optimizer.update(grads, moments, weights)
        return optax.apply_updates(weights, updates), moments

    weights = pipe.from_canonical(wrapped.canonical())
    weights, _ = step(*step(weights, jax.jit(optimizer.init)(weights)))
    trained = wrapped.write_back(pipe.to_canonical(weights))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def own_steps(state):
        own = nnx.merge(graphdef, state)
        own_optimizer = nnx.Optimizer(own, tx, wrt=nnx.Param)
        for _ in range(2):
            own_optimizer.update(own, nnx.grad(by_hand)(own))
        return nnx.state(own)

    graphdef, state = nnx.split(module)
    own = nnx.merge(graphdef, own_steps(state))
    tree_allclose(params(trained), params(own))
    assert abs(params(trained)["bias"] - params(module)["bias"]).max() > 1e-3


def test_arrays_that_the_pipeline_gives_away_are_nobody_elses():
    module = Transformer()
    wrapped = wrap(module)
    pipe = pipeline(wrapped, devices=1)
    weights = pipe.from_canonical(wrapped.canonical())
    back = wrapped.write_back(pipe.to_canonical(weights))
    jax.jit(lambda tree: jax.tree.map(jnp.negative, tree), donate_argnums=0)(weights)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(weights))
    tree_allclose(params(back), params(module))


def test_the_way_back_changes_values_only():
    module = Transformer(dropout=0.5)
    wrapped = wrap(module)
    module.bias[...] += 1.0
    nnx.reseed(module, default=5)
    doubled = wrapped.write_back(jax.tree.map(lambda leaf: 2 * leaf, wrapped.canonical()))
    assert type(doubled) is Transformer and doubled is not module
    assert nnx.graphdef(doubled) == nnx.graphdef(module)
    tree_allclose(params(doubled), jax.tree.map(lambda leaf: 2 * leaf, params(module)))
    assert type(doubled.decoder.layers[1].scale) is Scale
    assert doubled.decoder.layers[1].scale.get_metadata()["group"] == "scales"
    assert doubled.bias.get_metadata()["note"] == "kept"
    for own, kept in zip(*(jax.tree.leaves(nnx.state(m, nnx.RngState)) for m in (module, doubled)), strict=True):
        assert (own == kept).all()


def test_values_come_back_in_the_dtype_and_place_of_the_model():
    module = Transformer()
    module.bias.set_value(jax.device_put(jnp.zeros(VOCAB, jnp.bfloat16), jax.devices()[3]))
    wrapped = wrap(module)
    pipe = pipeline(wrapped, devices=2)
    canonical = jax.tree.map(jnp.float32, pipe.to_canonical(pipe.from_canonical(wrapped.canonical())))
    back = wrapped.write_back(canonical)
    assert back.bias.dtype == jnp.bfloat16 and back.bias.sharding == module.bias.sharding
    assert {leaf.device for leaf in jax.tree.leaves(params(back.decoder))} == {jax.devices()[0]}


def test_canonical_and_init_give_the_values_that_the_model_has_now():
    module = Transformer()
    wrapped = wrap(module)
    module.bias[...] += 3.0
    module.decoder.layers[2].scale[...] = 7.0
    pipe = pipeline(wrapped, devices=2)
    canonical = wrapped.canonical()
    assert (
        canonical["blocks"]["block"]["scale"][:, 0].tolist() == [0.5, 0.5, 7.0, 0.5]
        and (canonical["head"]["bias"] == 3).all()
    )
    tree_allclose(pipe.to_canonical(pipe.init(jax.random.key(9), BATCH)), canonical)
    tree_allclose(jp.sequential(wrapped.model).init(jax.random.key(9), BATCH), canonical)


def test_parameters_belong_to_who_reads_them_and_what_both_read_is_tied():
    wrapped = wrap(Transformer())
    canonical = jax.eval_shape(wrapped.canonical)
    assert wrapped.model.tie == {"head/table/embedding": "embed/table/embedding"}
    assert set(canonical["embed"]) == {"table", "positions"}
    assert jax.tree.map(jnp.shape, canonical["head"]) == {"bias": (12,), "decoder": {"norm": {"scale": (8,)}}}


def test_a_parameter_that_neither_reads_is_warned_of_and_kept():
    module: Any = Transformer()
    module.probe = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.warns(UserWarning, match="neither embed=… nor head=… reads probe/bias, probe/kernel"):
        wrapped = wrap(module)
    assert "probe" not in {**wrapped.canonical()["embed"], **wrapped.canonical()["head"]}
    back = wrapped.write_back(jax.tree.map(jnp.zeros_like, wrapped.canonical()))
    tree_allclose(params(back)["probe"], params(module)["probe"])


def test_what_is_read_without_effect_is_there_in_shape():
    def head(m, x, mb):
        _ = m.positions[...] @ m.table.embedding[...].T
        return m.head(x)

    wrapped = wrap(Transformer(), head=head)
    assert "positions" not in wrapped.canonical()["head"]
    jax.jit(jp.sequential(wrapped.model).loss)(wrapped.canonical(), BATCH)


def test_dropout_depends_on_the_key_alone_and_rests_without_one():
    module = Transformer(dropout=0.5)
    wrapped = wrap(module)
    pipe, oracle = pipeline(wrapped, devices=2), jp.sequential(wrapped.model, row_groups=MICROBATCHES)
    canonical = wrapped.canonical()
    weights = pipe.from_canonical(canonical)
    expected = jax.jit(oracle.loss, compiler_options=QUICK)
    losses = [pipe.loss(weights, BATCH, key) for key in (jax.random.key(1), jax.random.key(2), None)]
    np.testing.assert_allclose(losses[0], expected(canonical, BATCH, jax.random.key(1)), rtol=1e-5)
    quiet = nnx.clone(module)
    quiet.eval()
    np.testing.assert_allclose(losses[2], by_hand(quiet), rtol=1e-5)
    assert len({float(loss) for loss in losses}) == 3


class Plain(nnx.Module, pytree=False):
    """A module that may hold a Python list."""

    def __init__(self, layers, rngs):
        self.layers = list(layers)
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)


@pytest.mark.parametrize(
    ("make_layers", "path"),
    [
        (nnx.List, "decoder.layers"),
        (lambda layers: nnx.Sequential(*layers), "decoder.layers"),
        (lambda layers: nnx.Sequential(*layers), "decoder.layers.layers"),
        (lambda layers: nnx.Dict({str(3 * n): layer for n, layer in enumerate(layers)}), "decoder.layers"),
        (lambda layers: nnx.data(list(layers)), "decoder.layers"),
        (lambda layers: nnx.data(dict(enumerate(layers))), "decoder.layers"),
    ],
    ids=["List", "Sequential", "Sequential.layers", "Dict", "list", "dict"],
)
def test_blocks_are_found_in_every_kind_of_list(make_layers, path):
    module = Transformer(layers=5, make_layers=make_layers)
    wrapped = wrap(module, blocks=path)
    canonical = wrapped.canonical()
    assert canonical["blocks"]["block"]["up"]["kernel"].shape == (5, 8, 8)
    tree_allclose(params(wrapped.write_back(canonical)), params(module))
    plain = Transformer(layers=5)
    np.testing.assert_allclose(jp.sequential(wrapped.model).loss(canonical, BATCH), by_hand(plain), rtol=1e-5)


def test_blocks_are_found_in_a_python_list_of_a_module_that_is_no_pytree():
    module: Any = Transformer()
    module.decoder = Plain(module.decoder.layers, nnx.Rngs(0))
    wrapped = wrap(module)
    tree_allclose(params(wrapped.write_back(wrapped.canonical())), params(module))


class Wide(Layer):
    """Another kind: wider, with the mean square of its output as aux."""

    def __init__(self, rngs, dropout=0.0):
        super().__init__(rngs, dropout, width=16)

    def __call__(self, x):
        y = super().__call__(x)
        return y, (y**2).mean()


def test_kinds_that_alternate_are_stacked_apart_and_aux_joins_the_loss():
    module = Transformer()
    for number in (1, 3):
        module.decoder.layers[number] = Wide(nnx.Rngs(number))
    wrapped = wrap(module, kinds=["dense", "wide"] * 2, aux_weight=0.5)
    canonical = wrapped.canonical()
    assert canonical["blocks"]["wide"]["up"]["kernel"].shape == (2, 8, 16)
    pipe = pipeline(wrapped, devices=2)
    loss, grads = jax.jit(pipe.value_and_grad, compiler_options=QUICK)(pipe.from_canonical(canonical), BATCH)

    def with_aux(module):
        x, aux = module.embed(BATCH["tokens"]), jnp.zeros(())
        for layer in module.decoder.layers:
            x = layer(x)
            x, aux = (x[0], aux + x[1]) if isinstance(layer, Wide) else (x, aux)
        total, weight = token_loss(module.head(x), BATCH)
        return total / weight + 0.5 * aux

    expected, expected_grads = unwrapped(module, with_aux)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    tree_allclose(params(wrapped.write_back(pipe.to_canonical(grads))), expected_grads)


def test_the_microbatch_reaches_blocks_through_their_call():
    wrapped = wrap(Transformer(), block_call=lambda layer, x, mb: x + 0 * layer(x) + mb["mask"][..., None])
    block, x = wrapped.model.blocks[0], jnp.ones((8, 5, WIDTH))
    out = block.apply(block.init(None, None), x, BATCH, None)
    np.testing.assert_allclose(out, x + BATCH["mask"][..., None])


def share_a_bias(module):
    for layer in module.decoder.layers:
        layer.down.bias = module.decoder.layers[0].down.bias


def share_a_norm(module):
    for layer in module.decoder.layers:
        layer.norm.scale = module.decoder.norm.scale


def share_all(module):
    module.decoder.layers = nnx.List([module.decoder.layers[0]] * 4)


@pytest.mark.parametrize(
    ("share", "user", "home"),
    [
        (share_a_bias, "down/bias", "decoder/layers/0/down/bias"),
        (share_a_norm, "norm/scale", "decoder/norm/scale"),
        (share_all, "up/kernel", "decoder/layers/0/up/kernel"),
    ],
    ids=["among blocks", "around them too", "one block everywhere"],
)
def test_a_parameter_that_all_blocks_share_is_one_leaf_with_one_gradient(share, user, home):
    module = Transformer()
    share(module)
    wrapped = wrap(module)
    assert wrapped.model.tie[f"blocks/block/{user}"] == f"embed/{home}"
    canonical = wrapped.canonical()
    loss, grads = jax.jit(jp.sequential(wrapped.model, row_groups=4).value_and_grad, compiler_options=QUICK)(
        canonical, BATCH
    )
    expected, expected_grads = unwrapped(module)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    tree_allclose(params(wrapped.write_back(grads)), expected_grads)


def changed(change) -> Any:
    module = Transformer()
    change(module.decoder.layers)
    return module


def share_some(layers):
    layers[2].norm.scale = layers[1].norm.scale


def other_shape(layers):
    layers[2].down.kernel.set_value(jnp.ones((4, 8)))


def narrow(layers):
    layers[2] = Layer(nnx.Rngs(0), width=4)


def other_class(layers):
    layers[1] = Wide(nnx.Rngs(0))


def other_attribute(layers):
    layers[3].norm.epsilon = 0.5


def other_function(layers):
    layers[3] = Layer(nnx.Rngs(0), gate=jnp.sin)


def one_more(layers):
    layers[1].extra = nnx.Param(jnp.ones(2))


def one_less(layers):
    layers[1].down.bias = None


def other_type(layers):
    layers[1].scale = nnx.Param(jnp.ones(WIDTH))


def other_dtype(layers):
    layers[1].scale = Scale(jnp.ones(WIDTH, jnp.bfloat16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            other_shape,
            r"block 2 of .* has Param float32\[4, 8\] at 'down.kernel' but block 0 has Param float32\[8, 8\]",
        ),
        (narrow, "block 2 of 'decoder.layers' has 4 at 'down.in_features' but block 0 has 8"),
        (other_class, "block 1 of 'decoder.layers' has Wide but block 0 has Layer"),
        (other_attribute, r"block 3 of 'decoder.layers' has 0.5 at 'norm.epsilon' but block 0 has 1e-06"),
        (other_function, "block 3 of 'decoder.layers' has .* at 'gate' but block 0 has"),
        (one_more, r"block 1 of 'decoder.layers' has Param float32\[2\] at 'extra' but block 0 has nothing"),
        (one_less, r"block 1 of 'decoder.layers' has NoneType at 'down.bias' but block 0 has Param float32\[8\]"),
        (
            other_type,
            r"block 1 of 'decoder.layers' has Param float32\[8\] at 'scale' but block 0 has Scale float32\[8\]",
        ),
        (
            other_dtype,
            r"block 1 of 'decoder.layers' has Scale bfloat16\[8\] at 'scale' but block 0 has Scale float32\[8\]",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_blocks_that_differ_in_more_than_values_are_refused(change, message):
    with pytest.raises(PartitionError, match=message):
        wrap(changed(change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": "decoder.layrs"}, "must be the path of a list of modules in the model; try 'decoder.layers'"),
        ({"blocks": "decoder.norm"}, "try 'decoder.layers'"),
        ({"blocks": "layers"}, "try 'decoder.layers'"),
        ({"kinds": ["a", "b"]}, r"kinds=\['a', 'b'\] must name the kind of each of 4 blocks"),
        ({"kinds": "wide"}, "kinds='wide' must name the kind of each of 4 blocks"),
        ({"embed": lambda m, mb: m(mb["tokens"])}, "must not use the blocks at 'decoder.layers'"),
        ({"head": lambda m, x, mb: m.decoder.layers[3](x)}, "must not use the blocks at 'decoder.layers'"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        wrap(Transformer(), **options)


class Normed(Layer):
    def __init__(self, rngs, dropout=0.0):
        super().__init__(rngs, dropout)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)


def test_state_other_than_parameters_is_refused_in_blocks_and_around_them():
    with pytest.raises(ConfigError, match=r"decoder\.layers\.0\.norm\.mean is of type BatchStat"):
        wrap(Transformer(layer=Normed))
    module: Any = Transformer()
    module.seen = nnx.Cache(jnp.zeros(3))
    with pytest.raises(ConfigError, match=r"model\.seen is of type Cache"):
        wrap(module)


def test_a_parameter_that_only_some_blocks_share_is_refused():
    with pytest.raises(
        ConfigError, match="decoder/layers/1/norm/scale and decoder/layers/2/norm/scale are one parameter"
    ):
        wrap(changed(share_some))


def test_a_model_without_lists_or_values_is_refused():
    with pytest.raises(ConfigError, match="the model has none"):
        wrap(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ConfigError, match="has a shape but no value"):
        wrap(nnx.eval_shape(Transformer))


def test_a_tree_of_another_model_is_not_written_back():
    wrapped = wrap(Transformer())
    with pytest.raises(
        ConfigError, match=r"canonical\['blocks'\]\['block'\].* has shape \(6, 8\) but the model has \(4, 8\)"
    ):
        wrapped.write_back(wrap(Transformer(layers=6)).canonical())


def test_wrapping_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(Transformer())
