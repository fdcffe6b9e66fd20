"""`Pipeline.loss` in a function that JAX differentiates: `value_and_grad`'s gradient, or one line that says why not."""

import jax
import jax.numpy as jnp
import pytest
from helpers import toy_batch, toy_model, toy_pipeline, tree_allclose

import jaxpipe as jp
from jaxpipe.errors import ConfigError, ScheduleError
from jaxpipe.schedule import build

BATCH, KEY = toy_batch(4), jax.random.key(3)


@pytest.fixture(scope="module")
def made():
    pipe = toy_pipeline("1f1b", 2, 2, dropout=0.2)
    params = pipe.init(jax.random.key(0), BATCH)
    return pipe, params, *jax.jit(pipe.value_and_grad)(params, BATCH, KEY)


def penalty(params):
    return 0.1 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def weighted(factors, *trees):
    return jax.tree.map(lambda *leaves: sum(f * leaf for f, leaf in zip(factors, leaves, strict=True)), *trees)


@pytest.mark.parametrize("where", ["outside jit", "inside", "around"])
def test_the_loss_plus_a_penalty_has_the_gradient_of_both(made, where):
    pipe, params, loss, grads = made

    def total(params):
        return pipe.loss(params, BATCH, KEY) + penalty(params)

    both = {
        "outside jit": jax.value_and_grad(total),
        "inside": jax.jit(jax.value_and_grad(total)),
        "around": jax.value_and_grad(jax.jit(total)),
    }[where]
    value, gradient = both(params)
    tree_allclose(value, loss + penalty(params))
    tree_allclose(gradient, weighted((1, 0.2), grads, params))


def test_two_losses_add_up_and_so_do_their_gradients(made):
    pipe, params, _, grads = made
    plain = jax.jit(pipe.value_and_grad)(params, BATCH)[1]
    both = jax.jit(jax.grad(lambda params: pipe.loss(params, BATCH, KEY) + 2 * pipe.loss(params, BATCH)))(params)
    tree_allclose(both, weighted((1, 2), grads, plain))


def test_forward_mode_is_the_inner_product_with_the_gradient(made):
    pipe, params, loss, grads = made
    direction = jax.tree.map(jnp.sin, params)
    value, slope = jax.jvp(lambda params: pipe.loss(params, BATCH, KEY), (params,), (direction,))
    products = jax.tree.map(lambda g, d: jnp.sum(g * d), grads, direction)
    tree_allclose((value, slope), (loss, sum(jax.tree.leaves(products))))


def test_some_of_the_parameters_in_half_precision(made):
    pipe, params, _, _ = made
    params = params | {"head": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params["head"])}
    wanted = jax.jit(pipe.value_and_grad)(params, BATCH)[1]["head"]
    gradient = jax.jit(jax.grad(lambda head: pipe.loss(params | {"head": head}, BATCH)))(params["head"])
    tree_allclose(gradient, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), wanted))


def test_metrics_come_along_and_have_no_gradient():
    model = toy_model(2)

    def head(p, x, mb, key):
        return *model.head_loss.apply(p, x, mb, key), {"mean": x.mean((1, 2)), "rows": jnp.int32(len(x))}

    pipe = jp.Pipeline(
        jp.Model(model.embed, model.blocks, jp.HeadLoss(model.head_loss.init, head)),
        schedule=build("1f1b", devices=2, microbatches=2),
        mesh=jp.make_mesh(2),
    )
    params = pipe.init(jax.random.key(0), BATCH)
    wanted = jax.jit(lambda params: pipe.value_and_grad(params, BATCH, has_aux=True))(params)
    got = jax.value_and_grad(lambda params: pipe.loss(params, BATCH, has_aux=True), has_aux=True)(params)
    tree_allclose(got[0][1], wanted[0][1])
    tree_allclose((got[0][0], got[1]), (wanted[0][0], wanted[1]))
    with pytest.raises(
        ConfigError,
        match=r"^the metrics of Pipeline.loss\(…, has_aux=True\) and its parts but for the total have no gradient",
    ):
        jax.grad(lambda params: pipe.loss(params, BATCH, has_aux=True)[1]["mean"].sum())(params)


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_outside_jit_on_every_axis(axis):
    pipe = toy_pipeline("1f1b", 2, 2, fsdp=1 + (axis == "fsdp"), tensor=1 + (axis == "tensor"))
    batch = toy_batch(8)
    params = pipe.init(jax.random.key(0), batch)
    wanted = jax.jit(pipe.value_and_grad)(params, batch)
    tree_allclose(pipe.value_and_grad(params, batch), wanted)
    tree_allclose(jax.grad(lambda params: pipe.loss(params, batch))(params), wanted[1])


def test_what_has_no_derivative_is_refused_by_name(made):
    pipe, params, _, _ = made
    loss = lambda params: pipe.loss(params, BATCH)  # noqa: E731
    second = "Pipeline.value_and_grad cannot be differentiated, and so Pipeline.loss has no second derivative"
    refused = {
        "forward over reverse": lambda: jax.jvp(jax.grad(loss), (params,), (params,)),
        "in jit": lambda: jax.jit(lambda p: jax.jvp(jax.grad(loss), (p,), (p,)))(params),
        "reverse over reverse": lambda: jax.grad(lambda p: penalty(jax.grad(loss)(p)))(params),
        "forward over forward": lambda: jax.jvp(lambda p: jax.jvp(loss, (p,), (params,))[1], (params,), (params,)),
        "of the gradient itself": lambda: jax.grad(lambda p: pipe.value_and_grad(p, BATCH)[0])(params),
        "twice": lambda: jax.value_and_grad(pipe.value_and_grad)(params, BATCH),
    }
    for name, call in refused.items():
        with pytest.raises(ConfigError) as error:
            call()
        assert str(error.value).startswith(second) and "\n" not in str(error.value), name
    with pytest.raises(
        ConfigError, match=r"^Pipeline.loss has no gradient with respect to batch\['mask'\], only to its"
    ):
        jax.grad(lambda mask: pipe.loss(params, BATCH | {"mask": mask}))(jnp.asarray(BATCH["mask"]))


def test_a_schedule_without_backwards_has_no_gradient():
    pipe = toy_pipeline("inference", 2, 2)
    params = pipe.init(jax.random.key(0), BATCH)
    with pytest.raises(
        ScheduleError, match=r"^schedule='inference' runs forwards only and has no gradient; try '1f1b'"
    ):
        jax.grad(lambda params: pipe.loss(params, BATCH))(params)
