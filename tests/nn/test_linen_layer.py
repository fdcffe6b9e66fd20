"""The drop-in Linen layer: outputs and gradients are those of a loop over the same blocks."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.linen.spmd import logical_to_mesh_sharding
from helpers import QUICK, tree_allclose
from jax.sharding import PartitionSpec

import jaxpipe as jp
from jaxpipe.errors import ConfigError, PartitionError
from jaxpipe.nn import linen
from jaxpipe.schedule import build

B, T, D = 4, 3, 8


class Block(nn.Module):
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, shift=None, mask=None, bias=None, *, deterministic=True):
        h = nn.LayerNorm()(x) + (0.0 if shift is None else shift)
        h = nn.MultiHeadDotProductAttention(2, use_bias=False)(h, mask=mask)
        h = nn.Dense(D)(h) + (0.0 if bias is None else bias)
        return x + nn.Dropout(self.rate)(h, deterministic=deterministic)


x, shift, target = (jax.random.normal(jax.random.key(n), (B, T, D)) for n in range(3))
mask = jnp.arange(B * T * T).reshape(B, 1, T, T) % 3 > 0
bias = jax.random.normal(jax.random.key(3), (1, 1, D))
Layer: Any = linen.Pipelined
KINDS = ("split", "constant", "shared")


def layer_of(pipe, rate=0.0, **options) -> Any:
    defaults = {"num_layers": 4, "mesh": jp.make_mesh(pipe=pipe), "microbatches": 2, "inputs": KINDS}
    return Layer(**({"block": Block(rate)} | defaults | options))


def params_of(layer, *inputs) -> Any:
    return nn.meta.unbox(jax.jit(layer.init, compiler_options=QUICK)(jax.random.key(0), *inputs))["params"]


PARAMS = params_of(layer_of(1), x, shift, mask, bias)


def loss_and_grads(call, rngs=None):
    """Of ``call(params, x, shift, bias, rngs)``."""

    def loss(*given):
        return ((call(*given, rngs) - target) ** 2).mean()

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)), compiler_options=QUICK)
    return step(PARAMS, x, shift, bias)


def of_layer(layer, **options):
    return lambda params, x, shift, bias, rngs: layer.apply(
        {"params": params}, x, shift, mask, bias, rngs=rngs, **options
    )


def looped(params, x, shift, bias, _):
    for number in range(4):
        own = jax.tree.map(lambda leaf, number=number: leaf[number], params["blocks"])
        x = Block().apply({"params": own}, x, shift, mask, bias)
    return x


LOOPED = loss_and_grads(looped)


@pytest.mark.parametrize(
    ("pipe", "options"),
    [
        (1, {}),
        (1, {"repeats": 2}),
        (2, {}),
        (2, {"repeats": 2}),
        (4, {"microbatches": 4}),
        (2, {"remat": "none"}),
        (2, {"mesh": jp.make_mesh(pipe=2, data=2), "scan_blocks": True}),
        (2, {"stages": [3, 1]}),
        (2, {"schedule": build("zb_v", devices=2, microbatches=4), "microbatches": None}),
    ],
    ids=lambda given: "-".join(given) or "gpipe" if isinstance(given, dict) else str(given),
)
def test_outputs_and_gradients_are_those_of_a_loop(pipe, options):
    loss, grads = loss_and_grads(of_layer(layer_of(pipe, **options)))
    np.testing.assert_allclose(loss, LOOPED[0], rtol=1e-6)
    tree_allclose(grads, LOOPED[1])


def test_blocks_start_alike_whatever_the_pipeline_from_keys_of_their_own():
    tree = params_of(layer_of(2), x, shift, mask, bias)
    jax.tree.map(np.testing.assert_array_equal, tree, PARAMS)
    first, second, *_ = tree["blocks"]["Dense_0"]["kernel"]
    assert (first != second).all()


def test_parameters_are_made_from_one_microbatch_of_any_number_of_rows():
    seen = []

    class Sees(nn.Module):
        @nn.compact
        def __call__(self, x, table):
            seen.append((x.shape, table.shape))
            return nn.Dense(D)(x)

    layer = layer_of(2, block=Sees(), inputs=("shared",))
    out, variables = layer.init_with_output(jax.random.key(0), x, bias)
    assert seen[0] == ((B // 2, T, D), bias.shape)
    run = jax.jit(layer.apply)
    np.testing.assert_allclose(out, run(variables, x, bias), rtol=1e-5, atol=1e-6)
    assert layer.init_with_output(jax.random.key(0), x[:1], bias)[0].shape == (1, T, D)


def test_dropout_is_the_same_on_any_number_of_devices_and_new_for_other_rngs():
    rngs = {"dropout": jax.random.key(1)}
    loss, grads = loss_and_grads(of_layer(layer_of(2, 0.3)), rngs)
    wanted, wanted_grads = loss_and_grads(of_layer(layer_of(1, 0.3)), rngs)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    tree_allclose(grads, wanted_grads)

    run = jax.jit(of_layer(layer_of(1, 0.3)), compiler_options=QUICK)
    one, other = (run(PARAMS, x, shift, bias, {"dropout": jax.random.key(number)}) for number in (1, 2))
    assert not np.allclose(one, other)


def test_deterministic_drops_nothing_and_otherwise_a_stream_must_be_there():
    rngs = {"dropout": jax.random.PRNGKey(1)}

    def run(rngs, **options):
        call = of_layer(layer_of(1, 0.3), **options)
        return jax.jit(call, compiler_options=QUICK)(PARAMS, x, shift, bias, rngs)

    wanted: Any = jax.jit(looped, compiler_options=QUICK)(PARAMS, x, shift, bias, None)
    np.testing.assert_allclose(run(rngs, deterministic=True), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(None), wanted, rtol=1e-5, atol=1e-6)
    assert not np.allclose(run(rngs), wanted)
    assert not np.allclose(run({"params": jax.random.key(0)}), wanted)
    with pytest.raises(
        ConfigError, match=r"draws from the random stream 'dropout' .*; try rngs=\{'dropout': key\}, or"
    ):
        run(None, deterministic=False)


class Told(nn.Module):
    def __call__(self, x, train: bool):
        return jnp.full_like(x, train)


def test_a_train_flag_is_turned_round_and_needs_no_stream():
    layer = Layer(block=Told(), num_layers=2)
    variables = layer.init(jax.random.key(0), x)
    assert (layer.apply(variables, x) == 0).all() and (layer.apply(variables, x, deterministic=False) == 1).all()
    assert (layer.apply(variables, x, rngs={"dropout": jax.random.key(0)}) == 1).all()
    own = Layer(block=Told(), num_layers=2, call=lambda block, x, deterministic: block(x, True) + x)
    np.testing.assert_allclose(own.apply(variables, x), x + 2, rtol=1e-6)


class Net(nn.Module):
    """A layer made in a compact call from a block with modules for fields."""

    pipe: int
    repeats: int = 1

    @nn.compact
    def __call__(self, x, train):
        block = nn.Sequential([nn.Dense(D), nn.tanh, nn.Dropout(0.1, deterministic=not train)])
        mesh = jp.make_mesh(pipe=self.pipe)
        layer = Layer(block, num_layers=4, mesh=mesh, microbatches=2, repeats=self.repeats, name="layers")
        return nn.Dense(D)(layer(nn.Dense(D)(x), deterministic=not train))


class SetUp(nn.Module):
    """The same with setup."""

    pipe: int

    def setup(self):
        mesh = jp.make_mesh(pipe=self.pipe)
        self.first, self.last = nn.Dense(D), nn.Dense(D)
        self.layers = Layer(block=Block(0.1), num_layers=4, mesh=mesh, microbatches=2)

    def __call__(self, x, train):
        return self.last(self.layers(self.first(x), deterministic=not train))


def test_training_steps_within_a_model_are_those_of_one_device():
    def trained(model):
        optimizer = optax.adam(1e-2)
        params = jax.jit(partial(model.init, train=False), compiler_options=QUICK)(jax.random.key(0), x)["params"]
        state = optimizer.init(params)

        @partial(jax.jit, compiler_options=QUICK)
        def step(params, state, key):
            call = partial(model.apply, x=x, train=True, rngs={"dropout": key})
            loss, grads = jax.value_and_grad(lambda params: ((call({"params": params}) - target) ** 2).mean())(params)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(params, updates), state, loss

        losses = []
        for key in jax.random.split(jax.random.key(1), 3):
            params, state, loss = step(params, state, key)
            losses.append(float(loss))
        return nn.meta.unbox(params), losses

    one, wanted = trained(Net(1))
    params, losses = trained(Net(2, repeats=2))
    assert set(params["layers"]) == {"blocks"} and len(params) == 3
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), params, one)


def test_a_layer_made_in_setup_is_that_of_one_device():
    def run(pipe):
        model: Any = SetUp(pipe)
        variables = jax.jit(partial(model.init, train=True), compiler_options=QUICK)(jax.random.key(0), x)
        return variables, jax.jit(partial(model.apply, train=False), compiler_options=QUICK)(variables, x)

    (one, wanted), (two, out) = run(1), run(2)
    tree_allclose(nn.meta.unbox(two), nn.meta.unbox(one))
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("annotate", [nn.with_partitioning, nn.with_logical_partitioning])
def test_partitions_are_pipe_first_and_then_the_blocks_own(annotate):
    block = nn.Dense(D, kernel_init=annotate(nn.initializers.lecun_normal(), (None, "tensor")))
    mesh = jp.make_mesh(pipe=2, tensor=2)
    layer = Layer(block, num_layers=4, mesh=mesh, microbatches=2)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    specs: Any = nn.get_partition_spec(shapes)
    assert specs["params"]["blocks"] == {
        "kernel": PartitionSpec("pipe", None, "tensor"),
        "bias": PartitionSpec("pipe", None),
    }
    wanted = Layer(block, num_layers=4).init_with_output(jax.random.key(0), x)
    with jax.set_mesh(mesh):
        shardings = logical_to_mesh_sharding(specs, mesh, [("pipe", "pipe"), ("tensor", "tensor")])
        variables = jax.jit(layer.init, out_shardings=shardings)(jax.random.key(0), x)
        out = jax.jit(layer.apply)(variables, x)
    assert nn.meta.unbox(variables)["params"]["blocks"]["kernel"].sharding.spec == PartitionSpec("pipe", None, "tensor")
    np.testing.assert_allclose(out, wanted[0], rtol=1e-5, atol=1e-6)


class Changes(nn.Module):
    def __call__(self, x):
        return x.astype(jnp.bfloat16)


def test_what_does_not_fit_is_refused():
    def init(**options):
        return layer_of(2, 0.0, **({"inputs": ()} | options)).init(jax.random.key(0), x)

    with pytest.raises(ConfigError, match=r"block.batch_stats/mean is in the collection 'batch_stats'"):
        init(block=nn.BatchNorm(use_running_average=True))
    with pytest.raises(PartitionError, match="returns bfloat16"):
        init(block=Changes())
    with pytest.raises(PartitionError, match="returns bfloat16"):
        layer_of(2, block=Changes(), inputs=()).apply({"params": {"blocks": {}}}, x)
    with pytest.raises(ConfigError, match="num_layers=0 must be a whole number of at least 1"):
        init(num_layers=0)
    with pytest.raises(ConfigError, match=r"streams='noise' must be a sequence of names; try streams=\('noise',\)"):
        init(streams="noise")
    with pytest.raises(PartitionError, match="5"):
        init(num_layers=5)
    with pytest.raises(ConfigError, match=r"has shape \[4, .*but must start with num_layers=2; try num_layers=4"):
        layer_of(1, num_layers=2).apply({"params": PARAMS}, x, shift, mask, bias)
    with pytest.raises(ConfigError, match=r"batch size 3 must be a multiple of microbatches=2 \* data=1 = 2; try 4"):
        layer_of(2).apply({"params": PARAMS}, x[:3], shift[:3], mask[:3], bias)
    with pytest.raises(ConfigError, match="the 4 rows of x first"):
        layer_of(2).apply({"params": PARAMS}, x, shift[:2], mask, bias)
    with pytest.raises(ConfigError, match="declares 3 inputs beside x but the call has 0"):
        init(inputs=KINDS)
