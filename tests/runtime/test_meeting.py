"""A permute in a lane is found before it hangs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from helpers import QUICK, toy_batch, toy_model
from hlo import hlo_text

import jaxpipe as jp
from jaxpipe.errors import PartitionError
from jaxpipe.runtime.measure.meeting import check_meetings
from jaxpipe.schedule import build


@pytest.mark.parametrize("turn", [0, 1])
def test_hidden_dims_that_are_rolled_while_they_are_cut(turn):
    def block(p, x, mb, key):
        return x + jnp.roll(jnp.tanh(x @ p["up"]), turn, -1) @ p["down"]

    model = toy_model(2)
    rolling = jp.Model(model.embed, [replace(model.blocks[0], apply=block)] * 2, model.head_loss)
    mesh = jp.make_mesh(pipe=2, tensor=2)
    pipe = jp.Pipeline(rolling, schedule=build("1f1b", devices=2, microbatches=2), mesh=mesh)
    params = jax.eval_shape(pipe.init, jax.random.key(0), toy_batch(4))
    text = hlo_text(jax.jit(pipe.value_and_grad, compiler_options=QUICK).lower(params, toy_batch(4)).compile())
    if not turn:
        check_meetings(text)
        return
    with pytest.raises(PartitionError) as error:
        check_meetings(text)
    assert "in a lane that not all devices run moves data that is cut over 'tensor'" in str(error.value)
