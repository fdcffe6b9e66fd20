"""The NNX adapter on modules that the reference models do not cover."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from jaxpipe.errors import ConfigError, PartitionError
from jaxpipe.nn import nnx_model
from jaxpipe.runtime.sequential import sequential

BATCH = {"x": jnp.arange(12.0).reshape(4, 3) / 12, "y": jnp.ones((4, 3))}


class Deep(nnx.Module):
    """A list, a parameter used twice, and three random streams."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])
        self.layers[1].kernel = self.layers[0].kernel
        self.dropouts = nnx.List([nnx.Dropout(0.5, rngs=rngs) for _ in range(2)])
        self.rngs = rngs

    def __call__(self, x, scale=1.0):
        for layer, dropout in zip(self.layers, self.dropouts, strict=True):
            x = x + dropout(layer(x)) * scale
        return x


def model_of(block, **options):
    return nnx_model(
        embed=lambda rngs: nnx.Linear(3, 3, rngs=rngs),
        block=block,
        num_layers=2,
        head=lambda rngs: nnx.Linear(3, 3, rngs=rngs),
        loss=lambda y, mb: (((y - mb["y"]) ** 2).sum(), jnp.float32(mb["y"].size)),
        embed_call=lambda module, mb: module(mb["x"]),
        **options,
    )


def test_parameters_are_named_like_attributes_and_shared_ones_stored_once():
    params = model_of(Deep).blocks[0].init(jax.random.key(0), BATCH["x"])
    assert jax.tree.map(jnp.shape, params) == {"layers": {"0": {"bias": (3,), "kernel": (3, 3)}, "1": {"bias": (3,)}}}


def test_apply_without_a_key_is_the_module_in_eval_mode():
    block = model_of(Deep).blocks[0]
    module = Deep(nnx.Rngs(jax.random.key(0)))
    module.eval()
    params = block.init(jax.random.key(0), BATCH["x"])
    np.testing.assert_array_equal(block.apply(params, BATCH["x"], BATCH, None), module(BATCH["x"]))


def test_random_streams_start_anew_at_each_call():
    block = model_of(Deep).blocks[0]
    params = block.init(jax.random.key(0), BATCH["x"])
    first, again, other = (block.apply(params, BATCH["x"], BATCH, jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_random_streams_of_a_module_differ():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.one, self.two = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return jnp.stack([self.one(x), self.two(x)])

    block = model_of(Two).blocks[0]
    one, two = block.apply({}, jnp.ones((8, 8)), BATCH, jax.random.key(0))
    assert (one != two).any()


def test_raw_and_typed_keys_give_the_same_numbers():
    block = model_of(Deep).blocks[0]
    params = block.init(jax.random.PRNGKey(0), BATCH["x"])
    jax.tree.map(np.testing.assert_array_equal, params, block.init(jax.random.key(0), BATCH["x"]))
    outs = [block.apply(params, BATCH["x"], BATCH, make(3)) for make in (jax.random.PRNGKey, jax.random.key)]
    np.testing.assert_array_equal(*outs)


def test_the_microbatch_reaches_blocks_and_head_through_their_calls():
    model = model_of(
        Deep,
        block_call=lambda module, carry, mb: module(carry, scale=mb["y"] * 0),
        head_call=lambda module, carry, mb: carry + 1 - mb["y"],
    )
    params = model.blocks[0].init(jax.random.key(0), BATCH["x"])
    np.testing.assert_array_equal(model.blocks[0].apply(params, BATCH["x"], BATCH, None), BATCH["x"])
    head = model.head_loss.init(jax.random.key(0), BATCH["x"], BATCH)
    loss, weight = model.head_loss.apply(head, BATCH["x"], BATCH, None)
    np.testing.assert_allclose(loss, ((BATCH["x"] - 1) ** 2).sum())
    assert weight == 12


def test_a_model_differentiates_under_jit_and_scan():
    oracle = sequential(model_of(Deep), row_groups=2)
    canonical = jax.jit(oracle.init)(jax.random.key(0), BATCH)
    step = jax.jit(oracle.value_and_grad)
    loss, grads = step(canonical, BATCH, jax.random.key(1))
    assert jnp.isfinite(loss) and jax.tree.structure(grads) == jax.tree.structure(canonical)
    assert loss == step(canonical, BATCH, jax.random.key(1))[0] != step(canonical, BATCH, jax.random.key(2))[0]


@pytest.mark.parametrize("within", [False, True], ids=["no mesh", "mesh"])
def test_sharding_annotations_of_a_module_are_left_to_the_pipeline(within):
    annotated = nnx.with_partitioning(nnx.initializers.ones, (None, "tensor"))
    mesh = jax.make_mesh((2, 3), ("pipe", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:6])
    with jax.set_mesh(mesh) if within else contextlib.nullcontext():
        block = model_of(lambda rngs: nnx.Linear(3, 3, kernel_init=annotated, rngs=rngs)).blocks[0]
        params = jax.jit(jax.vmap(lambda key: block.init(key, None)))(jax.random.split(jax.random.key(0), 2))
        layer = jax.tree.map(lambda leaf: leaf[0], params)
        np.testing.assert_allclose(jax.jit(block.apply)(layer, jnp.ones((2, 3)), BATCH, None), jnp.full((2, 3), 3.0))


def test_a_model_may_be_made_while_tracing():
    @jax.jit
    def loss(x):
        model = model_of(Deep)
        return model.blocks[0].apply(model.blocks[0].init(jax.random.key(0), x), x, BATCH, jax.random.key(1))

    block = model_of(Deep).blocks[0]
    expected = block.apply(block.init(jax.random.key(0), BATCH["x"]), BATCH["x"], BATCH, jax.random.key(1))
    np.testing.assert_allclose(loss(BATCH["x"]), expected, atol=1e-6)


def with_attribute(value):
    class Stateful(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(3, 3, rngs=rngs)
            self.held = value()

    return Stateful


@pytest.mark.parametrize(
    ("block", "named"),
    [
        (lambda rngs: nnx.BatchNorm(3, rngs=rngs), "block.mean is of type BatchStat"),
        (with_attribute(lambda: nnx.Cache(jnp.zeros(3))), "block.held is of type Cache"),
        (with_attribute(lambda: nnx.data(jnp.zeros(3))), "block.held is of type array"),
        (with_attribute(lambda: jnp.zeros(3)), "block.held is of type array"),
    ],
    ids=["BatchStat", "Cache", "data", "array"],
)
def test_state_other_than_parameters_is_refused(block, named):
    with pytest.raises(ConfigError, match=named):
        model_of(block)


def test_no_layers_are_refused():
    with pytest.raises(PartitionError, match="at least one block"):
        nnx_model(embed=Deep, block=Deep, num_layers=0, head=Deep, loss=lambda y, mb: (y, y))


class Shift(nnx.Module):
    """A block whose one parameter is shared, and which has an auxiliary loss."""

    def __init__(self, rngs):
        self.amount = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        return x + self.amount[...], self.amount[...] ** 2


class WithShift(nnx.Linear):
    def __init__(self, rngs):
        super().__init__(3, 3, rngs=rngs)
        self.amount = nnx.Param(jnp.full((), 2.0))


def kinds_model(**options):
    return nnx_model(
        **{
            "embed": WithShift,
            "block": {"deep": Deep, "shift": Shift},
            "layers": ["deep", "shift", "deep", "shift"],
            "head": lambda rngs: nnx.Linear(3, 3, rngs=rngs),
            "loss": lambda y, mb: (((y - mb["y"]) ** 2).sum(), jnp.float32(mb["y"].size)),
            "embed_call": lambda module, mb: module(mb["x"]),
            "tie": {"blocks/shift/amount": "embed/amount"},
            "aux_weight": 0.5,
            **options,
        }
    )


def test_blocks_of_several_kinds_share_leaves_and_add_to_the_loss():
    model = kinds_model(block_call={"deep": lambda module, carry, mb: module(carry, scale=mb["y"] * 0)})
    oracle = sequential(model, row_groups=2)
    canonical = jax.jit(oracle.init)(jax.random.key(0), BATCH)
    assert set(canonical["blocks"]) == {"deep", "shift"} and canonical["blocks"]["shift"] == {}
    assert canonical["blocks"]["deep"]["layers"]["1"]["bias"].shape == (2, 3)

    def by_hand(canonical):
        embed, head = canonical["embed"], canonical["head"]
        x = BATCH["x"] @ embed["kernel"] + embed["bias"][None] + 2 * embed["amount"]
        y = x @ head["kernel"] + head["bias"][None]
        return ((y - BATCH["y"]) ** 2).mean() + 0.5 * 2 * embed["amount"] ** 2

    loss, grads = jax.jit(oracle.value_and_grad)(canonical, BATCH)
    expected, expected_grads = jax.value_and_grad(by_hand)(canonical)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads, expected_grads)


def test_blocks_of_a_kind_are_one_object():
    deep, shift, *again = kinds_model().blocks
    assert (deep.kind, shift.kind) == ("deep", "shift") and again == [deep, shift]
    assert deep.apply is again[0].apply is not shift.apply


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layers": None}, r"it goes with layers=…; try layers=\['deep', 'shift'\]"),
        ({"num_layers": 2}, r"it goes with layers=…"),
        ({"layers": ["deep", "drift"]}, r"layers names the kind 'drift' but block=\{…\} has 'deep', 'shift'"),
        ({"layers": ["shift"]}, r"has the kind 'deep' but layers=\['shift'\] does not name it"),
        ({"block_call": {"drift": None}}, r"block_call names the kind 'drift' but block=\{…\} has 'deep', 'shift'"),
        ({"block": Deep}, r"block=… is one factory: it goes with num_layers=…"),
        ({"block": Deep, "layers": None}, r"block=… is one factory: it goes with num_layers=…"),
        ({"block": Deep, "layers": None, "num_layers": 2, "block_call": {}}, r"and one block_call"),
        (
            {"block": {"deep": Deep, "shift": lambda rngs: nnx.BatchNorm(3, rngs=rngs)}},
            r"shift\.mean is of type BatchStat",
        ),
    ],
)
def test_kinds_that_do_not_fit_together_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        kinds_model(**wrong)
