"""Numbers: every training schedule against the unpipelined model, and fused against plain attention."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp

import jaxpipe as jp
from gpu_parts import llama
from gpu_parts.setting import Setting, failed, filled, relative_error
from jaxpipe.schedule import CATALOG, build

TOLERANCE = 1e-5
"""Of float32, the project's own: error of a leaf over its largest entry."""

QUICK = ("1f1b", "interleaved_1f1b", "zb_v")
"""Schedules that are looked at in toy size."""

HALF_TOLERANCE = 2e-2
"""Of bfloat16."""


def run(setting: Setting) -> None:
    """Reports one row per schedule, and two for attention."""
    jax.config.update("jax_default_matmul_precision", "highest")
    if not setting.compile_only:
        _schedules(setting)
    _attention(setting)


def _schedules(setting: Setting) -> None:
    size = llama.Size(width=64, heads=4, hidden=128, vocab=96, length=32, dtype="float32", fused=False)
    microbatches = 4
    model = llama.model(size, 2)
    shapes = llama.batch_shapes(size, 2 * microbatches)
    batch = {name: jnp.asarray(filled(shape, n) % size.vocab) for n, (name, shape) in enumerate(shapes.items())}
    oracle = jp.sequential(model, row_groups=microbatches)
    canonical = jax.jit(oracle.init, compiler_options=setting.compiler_options)(jax.random.key(0), batch)
    wanted = setting.compile(oracle.value_and_grad, canonical, batch).run(canonical, batch)

    def error_of(name: str, repeats: int) -> float:
        schedule = build(name, devices=1, microbatches=microbatches, repeats=repeats)
        pipe = jp.Pipeline(model, schedule=schedule, mesh=setting.mesh(), remat="none")

        def canonical_grads(canonical, batch):
            loss, grads = pipe.value_and_grad(pipe.from_canonical(canonical), batch)
            return loss, pipe.to_canonical(grads)

        return relative_error(setting.compile(canonical_grads, canonical, batch).run(canonical, batch), wanted)

    names = QUICK if setting.quick else [name for name in CATALOG if name != "inference"]
    with ThreadPoolExecutor() as pool:  # compiling takes most of the time, and all cores
        found = {(name, repeats := CATALOG[name].repeats or 2): pool.submit(error_of, name, repeats) for name in names}
        for (name, repeats), future in found.items():
            what, asked = f"{name}, V={repeats}", f"at most {TOLERANCE:g}"
            if failure := future.exception():
                setting.row(what, failed(failure), asked, False)
            else:
                error = future.result()
                setting.row(what, f"{error:.1e}", asked, error <= TOLERANCE, {"error": error})


def _attention(setting: Setting) -> None:
    length, heads, dims = (128, 2, 16) if setting.quick else (4096, 8, 128)
    shape = jax.ShapeDtypeStruct(
        (1, length, heads, dims), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(setting.devices()[0])
    )

    def out_and_gradient(fused, q, k, v, weight):
        def total(q, k, v):
            out = llama.attend(q, k, v, fused)
            return (out * weight).sum(dtype=jnp.float32), out

        return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)

    fused, plain = (setting.compile(partial(out_and_gradient, own), *[shape] * 4) for own in (setting.fused, False))
    if not setting.fits("fused attention", fused):
        return
    given = [jnp.asarray(50 * filled(shape, seed)) for seed in range(4)]
    (_, out), grads = fused.run(*given)
    (_, plain_out), plain_grads = plain.run(*given)
    for what, error in (
        ("output", relative_error(out, plain_out)),
        ("gradients", relative_error(grads, plain_grads)),
    ):
        asked = f"at most {HALF_TOLERANCE:g}"
        setting.row(f"fused attention, {what}", f"{error:.1e}", asked, error <= HALF_TOLERANCE, {"error": error})
