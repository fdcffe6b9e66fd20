"""The Linen adapter: against the oracle, against modules called in a row, and what it refuses."""

import contextlib
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, linen as nn
from helpers import LENGTH, QUICK, ROWS, VOCAB, WIDTH, toy_batch, tree_allclose

import jaxpipe as jp
from jaxpipe.errors import ConfigError, PartitionError
from jaxpipe.nn import linen_model
from jaxpipe.ops.losses import cross_entropy
from jaxpipe.schedule import build

LAYERS, MICROBATCHES = 4, 2
BATCH = toy_batch(ROWS * MICROBATCHES)
X = jnp.arange(12.0).reshape(4, 3) / 12


class Tokens(nn.Module):
    """Rows of a table, and a place for what others share."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, mb, train):
        self.param("shift", nn.initializers.ones, (WIDTH,))
        return nn.Dropout(self.rate, deterministic=not train)(nn.Embed(VOCAB, WIDTH, name="table")(mb["tokens"]))


class Attention(nn.Module):
    """A compact block that takes `deterministic`, with a mask if it is given one."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x, mask=None, *, deterministic):
        # Without biases: the key's has no gradient, only rounding.
        attend = nn.MultiHeadDotProductAttention(num_heads=2, use_bias=False)
        x = x + attend(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dropout(self.rate)(nn.Dense(WIDTH)(nn.gelu(nn.Dense(WIDTH)(x))), deterministic)


class Shift(nn.Module):
    """A block written with setup that takes `training`, whose shift may be shared, and with an auxiliary loss."""

    rate: float = 0.0

    def setup(self):
        self.inner, self.drop = nn.Dense(WIDTH), nn.Dropout(self.rate)
        self.shift = self.param("shift", nn.initializers.zeros, (WIDTH,))

    def __call__(self, x, training):
        y = self.drop(jnp.tanh(self.inner(x)), deterministic=not training)
        return x + y + self.shift[None, None], (y**2).mean()


class Logits(nn.Module):
    """A head whose kernel is like the embedding's table."""

    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm()(x) @ self.param("kernel", nn.initializers.lecun_normal(), (VOCAB, WIDTH)).T


def token_loss(logits, mb):
    return cross_entropy(logits, mb["targets"], mb["mask"])[:2]


def causal(module, carry, mb, deterministic):
    return module(carry, nn.make_causal_mask(mb["tokens"]), deterministic=deterministic)


def attention_model(rate=0.0, **options) -> jp.Model:
    return linen_model(
        embed=Tokens(rate),
        block=Attention(rate),
        num_layers=LAYERS,
        head=Logits(),
        loss=token_loss,
        block_call=causal,
        **options,
    )


def kinds_model(rate=0.0) -> jp.Model:
    return linen_model(
        embed=Tokens(rate),
        block={"attention": Attention(rate), "shift": Shift(rate)},
        layers=["attention", "shift", "attention", "shift"],
        head=Logits(),
        loss=token_loss,
        block_call={"attention": causal},
        tie={"head/kernel": "embed/table/embedding", "blocks/shift/shift": "embed/shift"},
        aux_weight=0.5,
    )


TIED = {"head/kernel": "embed/table/embedding"}
MODELS = {
    "plain": attention_model,
    "tied": lambda rate=0.0: attention_model(rate, tie=TIED),
    "kinds": kinds_model,
}


@cache
def oracle(name: str, rate: float) -> tuple[Any, Any, Any]:
    """``(canonical, loss, grads)`` without a pipeline."""
    sequential = jp.sequential(MODELS[name](rate), row_groups=MICROBATCHES)
    canonical = jax.jit(sequential.init, compiler_options=QUICK)(jax.random.key(0), BATCH)
    step = jax.jit(sequential.value_and_grad, compiler_options=QUICK)
    return canonical, *step(canonical, BATCH, jax.random.key(1) if rate else None)


class Plain(nn.Module):
    """The model as one would write it in Linen alone; a kind of block is numbered within its kind."""

    name_of_model: str

    @nn.compact
    def __call__(self, mb):
        x = Tokens(name="embed")(mb, train=False)
        mask, aux = nn.make_causal_mask(mb["tokens"]), 0.0
        for number in range(LAYERS):
            if self.name_of_model != "kinds":
                x = Attention(name=f"block_{number}")(x, mask, deterministic=True)
            elif number % 2 == 0:
                x = Attention(name=f"attention_{number // 2}")(x, mask, deterministic=True)
            else:
                x, more = Shift(name=f"shift_{number // 2}")(x, training=False)
                aux += more
        return Logits(name="head")(x), aux


def plain_params(name: str, canonical):
    """The canonical tree as the parameters of `Plain`."""
    params = {"embed": canonical["embed"], "head": dict(canonical["head"])}
    for kind, leaves in canonical["blocks"].items():
        for number in range(len(jax.tree.leaves(leaves)[0])):
            params[f"{kind}_{number}"] = jax.tree.map(lambda leaf, at=number: leaf[at], leaves)
    if name == "kinds":
        params["head"]["kernel"] = canonical["embed"]["table"]["embedding"]
        for number in range(LAYERS // 2):
            params[f"shift_{number}"]["shift"] = canonical["embed"]["shift"]
    return params


@pytest.mark.parametrize("name", ["plain", "kinds"])
def test_loss_and_gradients_are_those_of_the_modules_called_in_a_row(name):
    canonical, loss, grads = oracle(name, 0.0)

    def plain_loss(canonical):
        # The auxiliary loss is a mean over row groups of means of equal size, so that of the whole batch.
        out: Any = Plain(name).apply({"params": plain_params(name, canonical)}, BATCH)
        logits, aux = out
        total, weight = token_loss(logits, BATCH)
        return total / weight + 0.5 * aux

    expected, expected_grads = jax.jit(jax.value_and_grad(plain_loss), compiler_options=QUICK)(canonical)
    tree_allclose({"loss": loss, "grads": grads}, {"loss": expected, "grads": expected_grads})


@pytest.mark.parametrize(
    ("name", "devices", "repeats", "rate"),
    [
        ("plain", 1, 1, 0.0),
        ("plain", 2, 2, 0.0),
        ("tied", 1, 2, 0.0),
        ("kinds", 2, 1, 0.3),
    ],
)
def test_a_pipeline_of_linen_modules_gives_the_numbers_of_the_oracle(name, devices, repeats, rate):
    canonical, loss, grads = oracle(name, rate)
    schedule_name = "1f1b" if repeats == 1 else "interleaved_1f1b"
    schedule = build(schedule_name, devices=devices, microbatches=MICROBATCHES, repeats=repeats)
    pipe = jp.Pipeline(MODELS[name](rate), schedule=schedule, mesh=jp.make_mesh(devices))
    params = pipe.init(jax.random.key(0), BATCH)
    tree_allclose(pipe.to_canonical(params), canonical)
    step = jax.jit(pipe.value_and_grad, compiler_options=QUICK)
    actual, actual_grads = step(params, BATCH, jax.random.key(1) if rate else None)
    tree_allclose({"loss": actual, "grads": pipe.to_canonical(actual_grads)}, {"loss": loss, "grads": grads})


def test_dropout_changes_the_loss_and_a_call_without_a_key_has_none():
    canonical, with_dropout, _ = oracle("kinds", 0.3)
    _, without, _ = oracle("kinds", 0.0)
    loss = jax.jit(jp.sequential(kinds_model(0.3), row_groups=MICROBATCHES).loss, compiler_options=QUICK)
    evaluated = loss(canonical, BATCH)
    np.testing.assert_allclose(evaluated, without, rtol=1e-6)
    assert abs(with_dropout - without) > 1e-3


def small_model(block, **options) -> jp.Model:
    return linen_model(
        **{
            "embed": nn.Dense(3),
            "block": block,
            "num_layers": 2,
            "head": nn.Dense(3),
            "loss": lambda y, mb: ((y**2).sum(), jnp.float32(y.size)),
            **options,
        }
    )


def test_parameters_are_those_of_the_modules_own_init():
    carry = jnp.ones((ROWS, LENGTH, WIDTH))
    params = jax.jit(attention_model(0.3).blocks[0].init)(jax.random.key(3), carry)
    expected = jax.jit(partial(Attention(0.3).init, deterministic=True))(jax.random.key(3), carry)["params"]
    assert set(params) == {"LayerNorm_0", "MultiHeadDotProductAttention_0", "Dense_0", "Dense_1"}
    jax.tree.map(np.testing.assert_array_equal, params, expected)


class Flagged(nn.Module):
    """Says what it was told."""

    def told(self, x, flag):
        return jnp.full_like(x, flag)


class Deterministic(Flagged):
    def __call__(self, x, deterministic):
        return self.told(x, deterministic)


class Train(Flagged):
    def __call__(self, x, train: bool = False):
        return self.told(x, not train)


class Training(Flagged):
    def __call__(self, x, *, training):
        return self.told(x, not training)


@pytest.mark.parametrize("module", [Deterministic(), Train(), Training()])
def test_a_flag_of_call_says_whether_there_is_a_key(module):
    block, x = small_model(module).blocks[0], jnp.zeros((2, 3))
    assert (block.apply({}, x, X, None) == 1).all() and (block.apply({}, x, X, jax.random.key(0)) == 0).all()


def test_call_functions_get_the_batch_and_may_call_any_method_more_than_once():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dropout(0.5, deterministic=False)(x)

        def double(self, x):
            return 2 * x

    def call(module, carry, mb, deterministic):
        if deterministic:
            return module.double(carry) + mb
        return jnp.stack([module(carry), module(carry)])

    block = small_model(Twice(), block_call=call).blocks[0]
    np.testing.assert_array_equal(block.apply({}, X, X, None), 3 * X)
    one, two = block.apply({}, jnp.ones((8, 8)), X, jax.random.key(0))
    assert (one != two).any()


def test_every_random_stream_has_numbers_of_its_own_that_depend_on_the_key():
    class Streams(nn.Module):
        def __call__(self, x):
            return jnp.stack([jax.random.normal(self.make_rng(name), (3,)) for name in ("dropout", "noise")])

    block = small_model(Streams(), rngs=("dropout", "noise")).blocks[0]
    first, again, other = (block.apply({}, X, X, jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all() and (first[0] != first[1]).all()


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x) + jax.random.normal(self.make_rng("noise"), x.shape)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            jax.random.key(0),
            r"block draws from the random stream 'noise' but rngs=\('dropout',\); try rngs=\('dropout', 'n",
        ),
        (None, r"block draws from the random stream 'noise' in a call without a key; try passing on"),
    ],
    ids=["key", "no key"],
)
def test_a_random_stream_that_is_not_there_is_named(key, message):
    block = small_model(Noisy()).blocks[0]
    params = block.init(jax.random.key(0), X)
    with pytest.raises(ConfigError, match=message) as raised:
        block.apply(params, X, X, key)
    assert isinstance(raised.value.__cause__, errors.InvalidRngError)


class Sows(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.sow("losses", "size", (x**2).sum())
        return nn.Dense(3)(x)


@pytest.mark.parametrize(
    ("block", "named"),
    [
        (
            nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=False)]),
            r"block\.batch_stats/layers_1/mean is in the collection 'batch_stats'",
        ),
        (Sows(), r"block\.losses/size/0 is in the collection 'losses', .* returning a loss instead of sowing"),
        (
            nn.MultiHeadDotProductAttention(num_heads=1, decode=True),
            r"block\.cache/cache_index is in the collection 'cache'",
        ),
    ],
    ids=["batch_stats", "losses", "cache"],
)
def test_collections_other_than_params_are_refused(block, named):
    with pytest.raises(ConfigError, match=named):
        jax.eval_shape(small_model(block).blocks[0].init, jax.random.key(0), X)


def test_what_is_sown_into_intermediates_is_left_out():
    class Shows(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("intermediates", "x", x)
            return nn.Dense(3)(x)

    block = small_model(Shows()).blocks[0]
    params = block.init(jax.random.key(0), X)
    assert set(params) == {"Dense_0"} and block.apply(params, X, X, None).shape == X.shape


@pytest.mark.parametrize("within", [False, True], ids=["no mesh", "mesh"])
@pytest.mark.parametrize("annotate", [nn.with_partitioning, nn.with_logical_partitioning])
def test_partitioning_metadata_of_a_module_is_left_to_the_pipeline(annotate, within):
    block = nn.Dense(3, kernel_init=annotate(nn.initializers.ones, ("nowhere", "tensor")))
    model = small_model(block, embed=block, head=block)
    pipe = jp.Pipeline(model, schedule=build("gpipe", devices=2, microbatches=2), mesh=jp.make_mesh(2))
    with jax.set_mesh(jp.make_mesh(2)) if within else contextlib.nullcontext():
        actual = pipe.to_canonical(pipe.init(jax.random.key(0), X))
    assert jax.tree.map(jnp.shape, actual["blocks"]) == {"block": {"bias": (2, 3), "kernel": (2, 3, 3)}}
    np.testing.assert_array_equal(actual["head"]["kernel"], jnp.ones((3, 3)))


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x, mask, deterministic):
        return nn.Dense(3)(x) * mask


def test_a_block_that_needs_more_than_the_carry_is_made_by_its_block_init():
    model = small_model(
        {"masked": Masked()},
        num_layers=None,
        layers=["masked", "masked"],
        block_call=lambda module, carry, mb, deterministic: module(carry, mb * 0, deterministic),
        block_init={"masked": lambda module, carry: module(carry, 1.0, True)},
    )
    params = model.blocks[0].init(jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, params) == {"Dense_0": {"bias": (3,), "kernel": (3, 3)}}
    np.testing.assert_array_equal(model.blocks[0].apply(params, X, X, None), X * 0)
    with pytest.raises(ConfigError, match=r"block\.__call__ needs 'mask' besides the carry, .*; try block_init=lambda"):
        small_model(Masked(), block_call=lambda module, carry, mb, deterministic: module(carry, mb, deterministic))


def test_blocks_of_a_kind_are_one_object():
    attention, shift, *again = kinds_model().blocks
    assert (attention.kind, shift.kind) == ("attention", "shift") and again == [attention, shift]
    assert attention.init is again[0].init and attention.apply is again[0].apply is not shift.apply


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rngs": "dropout"}, r"rngs='dropout' must be a sequence of names; try rngs=\('dropout',\)"),
        (
            {"num_layers": None},
            r"block=… is one module: it goes with num_layers=… and one block_call and one block_init",
        ),
        ({"block_init": {}}, r"block=… is one module"),
        ({"block": {"one": nn.Dense(3)}}, r"it goes with layers=…; try layers=\['one'\]"),
        (
            {"block": {"one": nn.Dense(3)}, "num_layers": None, "layers": ["one"], "block_init": {"two": None}},
            r"block_init names the kind 'two' but block=\{…\} has 'one'",
        ),
    ],
)
def test_kinds_that_do_not_fit_together_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        small_model(**{"block": nn.Dense(3), **wrong})


def test_no_layers_are_refused():
    with pytest.raises(PartitionError, match="at least one block"):
        small_model(nn.Dense(3), num_layers=0)
