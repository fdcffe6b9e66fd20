"""One block of each kind timed on the present devices: `jaxpipe profile`.

Every lane is timed as the compiled loop runs it: in a loop, from stash slots and into them, weight gradients added to
an accumulator. The loop runs for few turns and for many, and the difference counts, so that filling the slots does not.
On CPU devices as many as there are cores run it at the same time, as in a pipeline there. One is timed alone too: it
takes the others' cores and their share of the memory's bandwidth, so that a bubble there costs less than its time.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxpipe.config.run import Config
from jaxpipe.measure.compiled import assemble_costs, embed_gradient, head
from jaxpipe.measure.parts import Parts, arrays, parts_of
from jaxpipe.measure.planning import gpt_shape
from jaxpipe.measure.profile import Profile, plain_fields
from jaxpipe.plan import DeviceSpec, LaneTimes
from jaxpipe.plan.cost import REMATS, Remat
from jaxpipe.runtime.loop import slots
from jaxpipe.runtime.stage.carry import join, part
from jaxpipe.runtime.stage.stage import Stage

FEW, MANY = 2, 14
"""Turns of a timed loop."""

HOP_BYTES = tuple(4**k * 1024 for k in range(7))
"""Sizes of the messages that are timed: 1 KB to 4 MB."""


def profile(
    config: Config,
    device: DeviceSpec,
    *,
    rows: Sequence[int],
    remats: tuple[Remat, ...] = REMATS,
    rounds: int = 7,
    note: Callable[[str], None] = lambda text: None,
) -> Profile:
    """Measures.

    Args:
        config: Whose model.
        device: What the present devices are.
        rows: Rows of the microbatches to time.
        remats: What forwards may keep.
        rounds: How often each lane is timed after one run to warm up; medians count.
        note: Is told what is being measured.
    """
    devices = jax.devices()
    together = devices[: min(len(devices), device.cores)] if device.cores else devices[:1]
    clock, single = _Clock(together, rounds), _Clock(together[:1], rounds)
    costs = {}
    for count in rows:
        parts = parts_of(config, count, remats)
        times = {}
        for kind in parts.kinds:
            for remat in remats:
                times[kind, remat] = _lane_times(parts.stages[kind, remat, 1], clock)
                lanes = ", ".join(f"{name} {1e3 * value:.3f}" for name, value in vars(times[kind, remat]).items())
                note(f"{kind:8} rows={count} remat={remat:4}  {lanes} ms")
        ends = _end_times(parts, clock)
        note(
            f"ends     rows={count}  embedding {1e3 * ends[0]:.3f}, its gradient {1e3 * ends[1]:.3f}, "
            f"head {1e3 * ends[2]:.3f} ms"
        )
        alone = 1.0
        if len(together) > 1:
            kind, remat = parts.kinds[0], remats[0]
            one = _lane_times(parts.stages[kind, remat, 1], single)
            beside = sum(vars(times[kind, remat]).values())
            alone = min(max(1.0, beside / sum(vars(one).values())), float(len(together)))
            note(f"{kind:8} rows={count} remat={remat:4}  alone {alone:.2f} times as fast as beside others")
        own = parts_of(config, count, remats).traced()
        found = assemble_costs(config, own, remats, times, ends, source="measured", device=device)
        costs[count] = replace(found, alone=alone)
    hops = tuple((float(size), _hop_s(devices, size, rounds)) for size in HOP_BYTES) if len(devices) > 1 else ()
    for size, seconds in hops:
        note(f"hop      {size / 1024:6.0f} KB  {1e6 * seconds:.1f} us")
    return Profile(
        device=device.name,
        kind=devices[0].device_kind,
        cores=device.cores,
        fields=plain_fields(gpt_shape(config.model, config.train.seq_len).fields),
        costs=costs,
        hops=hops,
        traffic_bytes_per_s=_traffic(clock),
    )


class _Clock:
    """Times a function that all of some devices run at once."""

    def __init__(self, devices: Sequence[Any], rounds: int):
        self.mesh = Mesh(np.asarray(devices), ("at",), axis_types=(AxisType.Auto,))
        self.rounds = rounds

    def seconds(self, run: Callable, *args: Any) -> float:
        """The median time of one turn of ``run(place, turns, *args)``.

        `place` is 0 on all devices and not known to be; `turns` is what `_turns` takes.
        """

        def body(place, turns, *args):
            # The results are not wanted, but all of them must be computed.
            leaves = jax.tree.leaves(run(jnp.minimum(place[0], 0), turns, *args))
            return sum(lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).astype(jnp.float32).reshape(1) for x in leaves)

        spec = PartitionSpec("at")
        where = (spec, *[PartitionSpec()] * (1 + len(args)))
        mapped = jax.shard_map(body, mesh=self.mesh, in_specs=where, out_specs=spec, check_vma=False)
        places = jnp.arange(self.mesh.size, dtype=jnp.int32)
        shardings = tuple(jax.sharding.NamedSharding(self.mesh, s) for s in where)
        compiled = jax.jit(mapped, in_shardings=shardings).lower(places, np.int32(FEW), *args).compile()
        few, many = (jax.device_put((places, np.int32(turns), *args), shardings) for turns in (FEW, MANY))
        times: dict[int, list[float]] = {FEW: [], MANY: []}
        for _ in range(self.rounds + 1):
            for turns, given in ((FEW, few), (MANY, many)):
                start = time.perf_counter()
                jax.block_until_ready(compiled(*given))
                times[turns].append(time.perf_counter() - start)
        few_s, many_s = (statistics.median(times[turns][1:]) for turns in (FEW, MANY))
        return max(many_s - few_s, 1e-9) / (MANY - FEW)


def _turns(place: Any, turns: Any, turn: Callable[[Any, Any], Any], state: Any) -> Any:
    """Runs ``turn(state, slot)`` so many times, with two slots in turn."""
    return lax.fori_loop(0, turns, lambda n, state: turn(state, place + n % 2), state)


def _lane_times(stage: Stage, clock: _Clock) -> LaneTimes:
    params, carry, context = (arrays(shapes) for shapes in (stage.params, stage.carry, stage.context))
    gradient, aux = arrays(stage.gradient, 1), arrays(dict(stage.aux), 2)
    residuals, crossing = list(stage.residuals), list(stage.weight_residuals)
    _, _, kept = jax.jit(stage.forward)(params, carry, context)
    _, crossed = jax.jit(stage.backward_input)(params, carry, kept, context, gradient, aux)

    def forward(place, turns, params, carry, context):
        def turn(state, at):
            x, stash = state
            y, _, kept = stage.forward(params, x, context)
            return (y, slots.put(stash, at, kept))

        return _turns(place, turns, turn, (carry, _stash(residuals, place)))

    def backward(place, turns, params, carry, kept, context, dy, daux):
        def turn(state, at):
            dy, sums = state
            dw, dx = stage.backward(params, slots.get(inputs, at), slots.get(stash, at), context, dy, daux)
            return (dx, jax.tree.map(_add, sums, dw))

        inputs, stash = _filled(carry, place), _filled(kept, place)
        return _turns(place, turns, turn, (dy, _sums(stage.params)))

    def inputs_only(place, turns, params, carry, kept, context, dy, daux):
        def turn(state, at):
            dy, left = state
            dx, crossing = stage.backward_input(params, slots.get(inputs, at), slots.get(stash, at), context, dy, daux)
            return (dx, slots.put(left, at, crossing))

        inputs, stash = _filled(carry, place), _filled(kept, place)
        return _turns(place, turns, turn, (dy, _stash(crossing, place)))

    def weights_only(place, turns, params, carry, kept, context, crossed):
        def turn(sums, at):
            dw = stage.backward_weight(
                params, slots.get(inputs, at), slots.get(stash, at), context, slots.get(left, at)
            )
            return jax.tree.map(_add, sums, dw)

        inputs, stash, left = _filled(carry, place), _filled(kept, place), _filled(crossed, place)
        return _turns(place, turns, turn, _sums(stage.params))

    return LaneTimes(
        forward=clock.seconds(forward, params, carry, context),
        input=clock.seconds(inputs_only, params, carry, kept, context, gradient, aux),
        weight=clock.seconds(weights_only, params, carry, kept, context, crossed),
        backward=clock.seconds(backward, params, carry, kept, context, gradient, aux),
    )


def _end_times(parts: Parts, clock: _Clock) -> tuple[float, float, float]:
    embed, top, carry, mb = (arrays(shapes) for shapes in (parts.embed, parts.head, parts.carry, parts.mb))
    gradient = part(carry)[0]

    def forward(place, turns, embed, mb):
        def turn(sums, at):
            moved = jax.tree.map(lambda x: x + at.astype(x.dtype), mb)
            return jax.tree.map(jnp.add, sums, parts.model.embed.apply(embed, moved, None))

        return _turns(place, turns, turn, jax.tree.map(jnp.zeros_like, carry))

    def backward(place, turns, embed, mb, gradient):
        def turn(sums, at):
            moved = jax.tree.map(lambda x: x + at.astype(x.dtype), mb)
            return jax.tree.map(_add, sums, embed_gradient(parts, embed, moved, gradient))

        return _turns(place, turns, turn, _sums(parts.embed))

    def both(place, turns, top, carry, mb):
        def turn(state, at):
            x, sums = state
            made = head(parts, top, x, jax.tree.map(lambda x: x + at.astype(x.dtype), mb), sums)
            return (join(carry, made.carry, part(x)[1]), made.sums)

        return _turns(place, turns, turn, (carry, _sums(parts.head)))

    return (
        clock.seconds(forward, embed, mb),
        clock.seconds(backward, embed, mb, gradient),
        clock.seconds(both, top, carry, mb),
    )


def _hop_s(devices: Sequence[Any], size_bytes: int, rounds: int) -> float:
    """Seconds in which every device sends to the next."""
    turns = 16
    mesh = Mesh(np.asarray(devices), ("at",), axis_types=(AxisType.Auto,))
    pairs = [(k, (k + 1) % len(devices)) for k in range(len(devices))]

    def body(x):
        return lax.scan(lambda x, _: (lax.ppermute(x, "at", pairs), None), x, None, length=turns)[0]

    spec = PartitionSpec("at")
    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    x = jax.device_put(jnp.zeros((len(devices), size_bytes // 4)), jax.sharding.NamedSharding(mesh, spec))
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        jax.block_until_ready(run(x))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / turns


def _traffic(clock: _Clock) -> float:
    """Bytes per second of elementwise work on arrays that no cache holds."""
    size = 8 * 2**20
    x, y = (arrays(jax.ShapeDtypeStruct((size,), jnp.float32), seed) for seed in (0, 1))

    def update(place, turns, x, y):
        return _turns(place, turns, lambda x, at: x * (1 + at.astype(x.dtype)) + y, x)

    return 3 * 4 * size / clock.seconds(update, x, y)


def _add(sums: Any, new: Any) -> Any:
    return sums + new.astype(sums.dtype)


def _sums(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes)


def _stash(shapes: Any, place: Any) -> Any:
    """Two slots and a scratch one."""
    return jax.tree.map(lambda s: jnp.full((3, *s.shape), place.astype(s.dtype)), shapes)


def _filled(values: Any, place: Any) -> Any:
    """The same, with values in them that XLA does not see to be equal."""
    return jax.tree.map(lambda x: jnp.stack([x, x, x]) + place.astype(x.dtype), values)
