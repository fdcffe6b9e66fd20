"""The drop-in NNX layer: outputs and gradients are those of a loop over the same blocks."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from helpers import tree_allclose

import jaxpipe as jp
from jaxpipe.errors import ConfigError, PartitionError, ScheduleError
from jaxpipe.nn import Pipelined
from jaxpipe.runtime.measure.sizes import memory_of
from jaxpipe.schedule import build

B, T, D = 4, 3, 8


class Gain(nnx.Param):
    """A user's own type of parameter."""


class Block(nnx.Module):
    def __init__(self, rngs, dropout=0.0):
        self.up = nnx.Linear(D, D, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(D, D, rngs=rngs)])
        self.gain = Gain(jnp.ones((1, 1, D)))
        self.drop = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x, shift=0.0, mask=None, bias=0.0):
        h = jnp.tanh(self.up(x + shift))
        h = h if mask is None else jnp.where(mask, h, 0)
        return x + self.drop(self.layers[0](h) * self.gain + bias)


INPUTS = ("split", "constant", "shared")
x, shift, target = (jax.random.normal(jax.random.key(n), (B, T, D)) for n in range(3))
mask = jnp.arange(B * T).reshape(B, T, 1) % 3 > 0
bias = jax.random.normal(jax.random.key(3), (1, 1, D))


def layer_of(pipe, *, data=1, num_layers=4, dropout=0.0, inputs=INPUTS, **options):
    mesh = jp.make_mesh(pipe=pipe, data=data)
    given: Any = options if "schedule" in options else {"microbatches": 2} | options
    make = partial(Block, dropout=dropout)
    return Pipelined(make, num_layers=num_layers, mesh=mesh, inputs=inputs, rngs=nnx.Rngs(0, dropout=1), **given)


def looped(blocks, x, shift, mask, bias):
    for block in blocks:
        x = block(x, shift, mask, bias)
    return x


def grad_of_loop(layer):
    """Output and gradients of the blocks one after the other, in the form of the layer's own."""
    blocks = nnx.List(layer.unstacked())

    @nnx.jit
    def run(blocks):
        def loss(blocks, x, shift, bias):
            return ((looped(blocks, x, shift, mask, bias) - target) ** 2).mean()

        return nnx.value_and_grad(loss, argnums=(0, 1, 2, 3))(blocks, x, shift, bias)

    loss, (own, *others) = run(blocks)
    trees = [nnx.to_pure_dict(own[n]) for n in range(len(blocks))]
    return loss, jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees), others


@nnx.jit
def loss_and_grads(layer):
    def loss(layer, x, shift, bias):
        return ((layer(x, shift, mask, bias) - target) ** 2).mean()

    return nnx.value_and_grad(loss, argnums=(0, 1, 2, 3))(layer, x, shift, bias)


def pure(gradient):
    """The blocks' part of a gradient, with names for keys as in the layer."""

    def named(tree):
        return {str(k): named(v) for k, v in tree.items()} if isinstance(tree, dict) else tree

    return named(nnx.to_pure_dict(gradient) if isinstance(gradient, nnx.State) else gradient)


CASES = {
    "one device": (1, {}),
    "gpipe": (2, {}),
    "four devices": (4, {"microbatches": 4}),
    "circular": (2, {"repeats": 2}),
    "stored residuals": (2, {"remat": "none"}),
    "scanned": (2, {"scan_blocks": True}),
    "uneven": (2, {"stages": [3, 1]}),
    "data": (2, {"data": 2}),
    "v placement, split backwards": (2, {"schedule": build("zb_v", devices=2, microbatches=4)}),
    "1f1b's order": (2, {"schedule": build("interleaved_1f1b", devices=2, microbatches=2, repeats=2)}),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_a_loop(case):
    pipe, options = CASES[case]
    layer = layer_of(pipe, **options)
    loss, (own, *others) = loss_and_grads(layer)
    wanted_loss, wanted, wanted_others = grad_of_loop(layer)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
    tree_allclose(pure(own)["blocks"], pure(wanted))
    tree_allclose(others, wanted_others)


def test_blocks_start_alike_whatever_the_pipeline():
    one, two = (nnx.to_pure_dict(nnx.state(layer_of(pipe), nnx.Param)) for pipe in (1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize("pipe, options", [(2, {}), (4, {}), (2, {"repeats": 2})])
def test_dropout_is_the_same_on_any_number_of_devices_and_new_at_each_call(pipe, options):
    one, many = layer_of(1, dropout=0.3), layer_of(pipe, dropout=0.3, **options)
    for _ in range(2):
        loss, (own, *_) = loss_and_grads(many)
        wanted_loss, (wanted, *_) = loss_and_grads(one)
        np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
        tree_allclose(pure(own)["blocks"], pure(wanted)["blocks"])
    assert not np.allclose(loss_and_grads(many)[0], loss)


def test_eval_and_deterministic_drop_nothing():
    layer = layer_of(2, dropout=0.3)
    wanted = layer_of(2)(x, shift, mask, bias)
    np.testing.assert_allclose(layer(x, shift, mask, bias, deterministic=True), wanted, atol=1e-6)
    layer.eval()
    np.testing.assert_allclose(layer(x, shift, mask, bias), wanted, atol=1e-6)
    layer.train()
    assert not np.allclose(layer(x, shift, mask, bias), wanted)


class Net(nnx.Module):
    def __init__(self, pipe, rngs, **options):
        self.first = nnx.Linear(D, D, rngs=rngs)
        self.layers = Pipelined(Block, num_layers=4, mesh=jp.make_mesh(pipe=pipe), microbatches=2, rngs=rngs, **options)
        self.last = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x):
        return self.last(self.layers(self.first(x)))


@nnx.jit
def train_step(net, optimizer):
    loss, grads = nnx.value_and_grad(lambda net: ((net(x) - target) ** 2).mean())(net)
    optimizer.update(net, grads)
    return loss


def trained(pipe, tx=None, **options):
    net = Net(pipe, nnx.Rngs(0), **options)
    optimizer = nnx.Optimizer(net, tx or optax.adam(1e-2), wrt=nnx.Param)
    losses = [train_step(net, optimizer) for _ in range(3)]
    return net, np.array(losses)


def test_training_steps_are_those_of_one_device():
    one, wanted = trained(1)
    net, losses = trained(2, repeats=2)
    assert wanted[-1] < wanted[0]
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    tree_allclose(nnx.to_pure_dict(nnx.state(net, nnx.Param)), nnx.to_pure_dict(nnx.state(one, nnx.Param)))


def test_a_mask_of_optax_freezes_what_it_names_and_decays_what_has_two_dims():
    def trains(state):
        return jax.tree.map_with_path(lambda path, _: "layers" not in jax.tree_util.keystr(path)[:10], state)

    def frozen(state):
        return jax.tree.map(lambda train: not train, trains(state))

    tx = optax.chain(optax.masked(optax.adam(1e-2), trains), optax.masked(optax.set_to_zero(), frozen))
    (one, wanted), (two, losses) = (trained(pipe, tx) for pipe in (1, 2))
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    states = [nnx.to_pure_dict(nnx.state(net, nnx.Param)) for net in (Net(2, nnx.Rngs(0)), one, two)]
    start, wanted, got = states
    tree_allclose(got, wanted)
    jax.tree.map(np.testing.assert_array_equal, got["layers"], start["layers"])
    assert not np.array_equal(got["first"]["kernel"], start["first"]["kernel"])


def test_calls_outside_of_jit_compile_once(caplog):
    layer = layer_of(2)
    with jax.log_compiles():
        first = layer(x, shift, mask, bias)
        assert "Compiling" in caplog.text
        caplog.clear()
        np.testing.assert_array_equal(layer(x, shift, mask, bias), first)
        assert "Compiling" not in caplog.text


def test_types_and_partitions_survive():
    layer = layer_of(2)
    assert type(layer.blocks["gain"]) is Gain
    assert layer.blocks["up"]["kernel"].sharding.spec == jax.sharding.PartitionSpec("pipe")
    specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(layer, nnx.Param)))
    assert all(
        spec[0] == "pipe" for spec in jax.tree.leaves(specs["blocks"], is_leaf=lambda s: not isinstance(s, dict))
    )
    assert [type(block) for block in layer.unstacked()] == [Block] * 4


def test_own_annotations_follow_the_layer_dim():
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "tensor"))
    layer = Pipelined(lambda rngs: nnx.Linear(D, D, kernel_init=init, rngs=rngs), num_layers=2, rngs=nnx.Rngs(0))
    assert layer.blocks["kernel"].get_metadata()["out_sharding"] == ("pipe", None, "tensor")


def test_frozen_parameters_have_no_gradient_and_the_others_the_same():
    layer = layer_of(2)
    wanted = pure(loss_and_grads(layer)[1][0])["blocks"]["gain"]
    only = nnx.DiffState(0, Gain)
    own = nnx.grad(lambda layer: ((layer(x, shift, mask, bias) - target) ** 2).mean(), argnums=only)(layer)
    assert jax.tree.structure(nnx.to_pure_dict(own)) == jax.tree.structure({"blocks": {"gain": 0}})
    np.testing.assert_allclose(pure(own)["blocks"]["gain"], wanted, rtol=1e-5, atol=1e-8)


def test_a_checkpointed_call_gives_the_same_gradient():
    layer = layer_of(2)
    wanted = loss_and_grads(layer)[1][1]
    layer.eval()
    call = jax.checkpoint(lambda x: layer(x, shift, mask, bias))
    got = jax.jit(jax.grad(lambda x: ((call(x) - target) ** 2).mean()))(x)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-7)


def test_half_precision_in_and_out():
    def make(rngs):
        return nnx.Linear(D, D, dtype=jnp.bfloat16, rngs=rngs)

    half = x.astype(jnp.bfloat16)
    outs = []
    for pipe in (1, 2):
        layer = Pipelined(make, num_layers=4, mesh=jp.make_mesh(pipe=pipe), microbatches=2, rngs=nnx.Rngs(0))

        def energy(layer, half):
            return (layer(half).astype(jnp.float32) ** 2).sum()

        outs.append(nnx.jit(nnx.value_and_grad(energy, argnums=(0, 1)))(layer, half))
    (loss, (own, dx)), (wanted, (wanted_own, wanted_dx)) = outs[1], outs[0]
    assert dx.dtype == jnp.bfloat16 and own.blocks["kernel"].get_value().dtype == jnp.float32
    np.testing.assert_allclose(loss, wanted, rtol=2e-2)
    scale = float(jnp.abs(wanted_dx).max())
    np.testing.assert_allclose(dx.astype(np.float32), wanted_dx.astype(np.float32), atol=2e-2 * scale)
    for name in ("kernel", "bias"):
        a, b = (tree["blocks"][name] for tree in (pure(own), pure(wanted_own)))
        np.testing.assert_allclose(a, b, rtol=5e-2, atol=5e-2 * float(jnp.abs(b).max()))


def test_orbax_saves_and_restores_it(tmp_path):
    layer, other = layer_of(2), layer_of(4)
    state = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "layer", nnx.to_pure_dict(nnx.state(other, nnx.Param)))
    nnx.update(other, restored)
    np.testing.assert_allclose(other(x, shift, mask, bias), layer(x, shift, mask, bias), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_memory_grows_by_a_block_input_per_microbatch():
    """With full remat, and so does what an eval call keeps not at all."""

    def temporaries(microbatches, train):
        layer = Pipelined(
            lambda rngs: nnx.Linear(256, 256, rngs=rngs),
            num_layers=4,
            mesh=jp.make_mesh(pipe=2),
            microbatches=microbatches,
            rngs=nnx.Rngs(0),
        )
        graphdef, state = nnx.split(layer)

        def call(state, x):
            return (nnx.merge(graphdef, state)(x) ** 2).sum()

        batch = jax.ShapeDtypeStruct((microbatches * 64, 256), jnp.float32)
        return memory_of(jax.jit(jax.grad(call) if train else call).lower(state, batch).compile()).temp_size_in_bytes

    microbatch = 64 * 256 * 4
    few, many = (temporaries(count, train=True) for count in (8, 32))
    # [1] By microbatch: the input of the stage, the layer's input and output and their gradients.
    assert microbatch < (many - few) / 24 < 8 * microbatch
    few, many = (temporaries(count, train=False) for count in (8, 32))
    assert (many - few) / 24 < 4 * microbatch


class Counting(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(D, rngs=rngs)

    def __call__(self, x):
        return self.norm(x)


def make(**options):
    defaults = {"num_layers": 4, "mesh": jp.make_mesh(pipe=2), "microbatches": 2, "rngs": nnx.Rngs(0)}
    return Pipelined(options.pop("block", Block), **(defaults | options))


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"num_layers": 0}, ConfigError, "num_layers=0 must be a whole number of at least 1"),
        ({"num_layers": "4"}, ConfigError, "num_layers='4' must be a whole number of at least 1"),
        ({"microbatches": 0}, ConfigError, "microbatches=0 must be a whole number of at least 1"),
        ({"repeats": "2"}, ConfigError, "repeats='2' must be a whole number of at least 1"),
        ({"mesh": 2}, ConfigError, "mesh is 2 but must be a Mesh; try jaxpipe.make_mesh"),
        ({"schedule": "1f1b"}, ScheduleError, "schedule is '1f1b' but must be a Schedule; try jaxpipe.schedule.build"),
        ({"rngs": 0}, ConfigError, r"rngs is 0 but must be a Rngs; try nnx.Rngs\(0\)"),
        ({"block": nnx.Linear(D, D, rngs=nnx.Rngs(0))}, ConfigError, "block is a Linear but must be a factory"),
        ({"remat": None}, ConfigError, "remat=None must be one of full, none, all or a policy"),
        ({"stages": 2}, PartitionError, "stages=2 must hold one number of blocks for each"),
        ({"inputs": "split"}, ConfigError, r"inputs='split' must be a sequence of words; try inputs=\('split',\)"),
        ({"num_layers": 5}, PartitionError, "5"),
        ({"microbatches": None}, ConfigError, "microbatches=None .* try microbatches=8"),
        ({"inputs": ("mask",)}, ConfigError, "'split', 'shared', 'constant'"),
        ({"block": Counting}, ConfigError, "block.norm.* of type BatchStat"),
        ({"mesh": jax.make_mesh((2,), ("x",))}, ConfigError, "must hold 'pipe'"),
        ({"schedule": build("gpipe", devices=4, microbatches=2)}, ConfigError, "mesh.pipe=2 .* devices=4"),
        ({"schedule": build("gpipe", devices=2, microbatches=4)}, ConfigError, "microbatches=2"),
    ],
)
def test_wrong_options_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        make(**options)


def test_stages_as_an_array():
    assert make(stages=np.array([1, 3])).sweeps.layout.counts == (1, 3)


def test_inputs_without_rows_and_second_derivatives_are_refused():
    layer = make()
    for wrong, found in ((3.0, r"x is float32\[\]"), (None, "x holds no array"), ([], "x holds no array")):
        with pytest.raises(ConfigError, match=f"^{found} but must be an array"):
            layer(wrong)
    first = jax.grad(lambda x: layer(x, deterministic=True).sum())
    with pytest.raises(ConfigError, match=r"^a pipelined layer has no second derivative \(jax.hessian"):
        jax.grad(lambda x: first(x).sum())(x)


def test_wrong_calls_are_refused():
    layer = layer_of(2)
    with pytest.raises(ConfigError, match=r"batch size 3 must be a multiple of microbatches=2 \* data=1 = 2; try 4"):
        layer(x[:3], shift[:3], mask[:3], bias)
    with pytest.raises(ConfigError, match=r"the 4 rows of x first"):
        layer(x, shift[:2], mask, bias)
    with pytest.raises(ConfigError, match="declares 3 inputs beside x but the call has 1"):
        layer(x, shift)
    for block, words in (
        (lambda rngs: nnx.Linear(D, 2 * D, rngs=rngs), r"must return what it was given; try float32\[2, 3, 8\]"),
        (lambda rngs: nnx.Linear(D, D, dtype=jnp.bfloat16, rngs=rngs), "returns bfloat16"),
    ):
        with pytest.raises(PartitionError, match=words):
            make(block=block)(x)


def test_a_call_within_a_shard_map_over_pipe_is_refused():
    layer = make()
    spec = jax.sharding.PartitionSpec("pipe")
    layer.eval()
    mapped = jax.shard_map(layer, mesh=jp.make_mesh(pipe=2), in_specs=spec, out_specs=spec, check_vma=False)
    with pytest.raises(ConfigError, match="'pipe' is already bound"):
        jax.jit(mapped)(x)
