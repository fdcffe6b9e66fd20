"""One training step and one measurement, each a single compiled program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxpipe.runtime.layout.mesh import TENSOR
from jaxpipe.runtime.measure.meeting import check_meetings


class TrainState(NamedTuple):
    """All that changes from step to step.

    Attributes:
        step: Optimizer steps taken, an int32 scalar.
        params: The pipeline's parameters, float32 unless the model says otherwise, sharded on the mesh.
        opt_state: The optimizer's state, sharded alike.
    """

    step: Any
    params: Any
    opt_state: Any


def init_state(pipe, tx: optax.GradientTransformation, key, batch) -> TrainState:
    """Draws the weights and zeroes the optimizer, on the devices where they stay.

    Args:
        pipe: A `Pipeline`.
        tx: From ``pipe.optimizer``.
        key: A `jax.random` key; equal keys give equal weights for every schedule and mesh.
        batch: A batch, or its shapes.
    """
    params = pipe.init(key, batch)
    step = jax.device_put(np.int32(0), NamedSharding(pipe.mesh, PartitionSpec()))
    return TrainState(step, params, tx.init(params))


def make_train_step(pipe, tx: optax.GradientTransformation, state, batch, *args: Any, **options: Any) -> Callable:
    """Compiles what `lower_train_step` traces, from the same arguments.

    Raises:
        PartitionError: Annotations of the model over `tensor` that would hang, see `jaxpipe.runtime.measure.meeting`.
    """
    step = lower_train_step(pipe, tx, state, batch, *args, **options).compile()
    if pipe.mesh.shape.get(TENSOR, 1) > 1:
        check_meetings(step.as_text() or "")
    return step


def lower_train_step(
    pipe,
    tx: optax.GradientTransformation,
    state,
    batch,
    rate: optax.Schedule | None,
    key,
    loss_scale: float = 1.0,
    skip_nonfinite: bool = False,
) -> jax.stages.Lowered:
    """Traces ``(state, batch) -> (state, metrics)``; the state passed in is donated, its successor rests alike.

    Args:
        pipe: A `Pipeline`.
        tx: From ``pipe.optimizer``.
        state: From `init_state`, or its shapes with their shardings.
        batch: A batch on the devices; likewise.
        rate: Learning rate by step, for the metrics only; None leaves ``lr`` out.
        key: Where dropout keys come from, folded with the step; None means no dropout.
        loss_scale: See `Pipeline.value_and_grad`; metrics do not show it.
        skip_nonfinite: Where loss or gradient are not finite, keep parameters and optimizer as they are.

    Returns:
        The step, yet to be compiled. Its metrics are scalars on the device: ``loss``, the head's alone, ``grad_norm``
        before clipping, and ``lr``; where blocks have an aux loss ``aux_loss``, what it adds, and by their names the
        other numbers that blocks return.
    """

    def train_step(state: TrainState, batch):
        step_key = None if key is None else jax.random.fold_in(key, state.step)
        losses, grads = pipe.value_and_grad(state.params, batch, step_key, loss_scale=loss_scale, parts=True)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": losses.head, "grad_norm": optax.tree.norm(grads)}
        if losses.aux is not None:
            metrics |= {"aux_loss": losses.aux, **losses.means}
        if skip_nonfinite:
            good = jnp.isfinite(losses.total) & jnp.isfinite(metrics["grad_norm"])
            new, old = (params, opt_state), (state.params, state.opt_state)
            params, opt_state = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)
        if rate is not None:
            metrics["lr"] = jnp.asarray(rate(state.step), jnp.float32)
        return TrainState(state.step + 1, params, opt_state), metrics

    rest_alike = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(rest_alike, None)).lower(state, batch)


def make_eval_step(pipe, params, batch) -> Callable:
    """Compiles ``(params, batch) -> loss``, the head's alone, without dropout."""
    return jax.jit(lambda params, batch: pipe.loss(params, batch, parts=True).head).lower(params, batch).compile()
