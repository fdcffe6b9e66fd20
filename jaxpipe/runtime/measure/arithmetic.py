"""How many floating-point operations a program's matrix products hold, counted in its jaxpr."""

import math
from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.jax_internals import ClosedJaxpr, Jaxpr, dce_jaxpr
from jaxpipe.runtime.model import Tree
from jaxpipe.runtime.stage.carry import join, part
from jaxpipe.runtime.stage.heads import head_gradients

KERNELS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}
"""Products of the fused attention kernels, which take queries [B, T, H, d] and keys [B, S, K, d], each as large as that
of the scores; the backward makes those again. Causal ones count whole, as elsewhere."""


def dot_flops(function: Any, *args: Any) -> int:
    """Floating-point operations of all matrix products that a call makes; two per multiply-add.

    What no output needs does not count, as XLA drops it. A conditional counts its dearest branch and a scan its body
    times its length.

    Args:
        function: Anything that can be traced.
        args: Arrays or shapes.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return _flops(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _flops(jaxpr: Jaxpr) -> int:
    return sum(_eqn_flops(eqn) for eqn in jaxpr.eqns)


def _eqn_flops(eqn: Any) -> int:
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        return 2 * eqn.outvars[0].aval.size * math.prod(left[dim] for dim in contracted)
    if products := KERNELS.get(eqn.primitive.name):
        queries, keys = (var.aval.shape for var in eqn.invars[:2])
        return 2 * products * math.prod(queries) * keys[1]
    inner = [
        _flops(value.jaxpr if isinstance(value, ClosedJaxpr) else value)
        for entry in eqn.params.values()
        for value in (entry if isinstance(entry, tuple | list) else (entry,))
        if isinstance(value, ClosedJaxpr | Jaxpr)
    ]
    if eqn.primitive.name == "cond":
        return max(inner)
    return sum(inner) * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else sum(inner)


def arithmetic_ratio(pipe: Any, params: Tree, batch: Tree) -> float:
    """Arithmetic that the table's actions execute over the model's own: 3 times its forward.

    1 means that no matrix product runs twice and none runs for nothing; 4/3 that every block's forward runs twice.

    Args:
        pipe: A `Pipeline`.
        params: Its parameters, arrays or shapes.
        batch: A batch, arrays or shapes.
    """
    program = pipe.program(params, batch)
    stages, model, schedule = program.stages, program.model, pipe.schedule
    context, carry = stages.stage.context, stages.stage.carry
    actions = Counter((a.stage, a.phase) for actions in schedule.order for a in actions)
    heads = sum(r >= 0 for row in pipe.table.columns["h_gradient"] for r in row)
    head = jax.eval_shape(program.ends.head, dict(program.ends.shapes))

    def loss(head, floating, context):
        carried = join(carry, floating, part(carry)[1])
        return model.head_loss.apply(head, carried, context.mb, context.group)[0]

    def gradients(head, floating, context):
        joined = partial(join, carry, others=part(carry)[1])
        return head_gradients(model.head_loss, head, floating, joined, context.mb, context.group, jnp.ones(()), None)

    executed = heads * dot_flops(gradients, head, part(carry)[0], context)
    forward = heads * dot_flops(loss, head, part(carry)[0], context)
    for number in range(schedule.stages):
        at = stages.number[schedule.repeat_of(number)][schedule.device_of(number)]
        stage = stages.branches[at].stage
        known = stage.params, carry, context
        executed += actions[number, "F"] * dot_flops(stage.forward, *known)
        forward += actions[number, "F"] * dot_flops(stage.run, *known)
        if times := actions[number, "B"]:
            executed += times * dot_flops(stage.backward, *stage.backward_shapes)
        if times := actions[number, "I"]:
            executed += times * dot_flops(stage.backward_input, *stage.backward_shapes)
        if times := actions[number, "W"]:
            executed += times * dot_flops(stage.backward_weight, *stage.backward_weight_shapes)
    return executed / (3 * forward)
