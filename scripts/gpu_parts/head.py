"""The cross entropy over a large vocabulary: the package's against float32 logits that are there as a whole."""

from functools import partial

import jax
import jax.numpy as jnp
from gpu_parts import llama
from gpu_parts.setting import Setting, filled, relative_error

TEMPORARY_ASKED = 0.5e9
TOLERANCE = 2e-2

SIZES = {"32k": (32000, 4096), "128k": (128256, 8192)}
"""Vocabulary and tokens."""


def run(setting: Setting) -> None:
    """Reports on each vocabulary: time, temporaries, and whether both agree."""
    for number, (name, (vocab, tokens)) in enumerate(SIZES.items()):
        vocab, tokens, width = (vocab // 500, tokens // 256, 32) if setting.quick else (vocab, tokens, 4096)
        size = llama.Size(width=width, heads=1, hidden=1, vocab=vocab, length=tokens)
        place = jax.sharding.SingleDeviceSharding(setting.devices()[0])
        kernel = jax.ShapeDtypeStruct((vocab, width), jnp.bfloat16, sharding=place)
        features = jax.ShapeDtypeStruct((1, tokens, width), jnp.bfloat16, sharding=place)
        targets = jax.ShapeDtypeStruct((1, tokens), jnp.int32, sharding=place)
        shapes = kernel, features, targets
        before, after = (
            setting.compile(jax.value_and_grad(own, (0, 1)), *shapes) for own in (plain, partial(ours, size))
        )
        what = f"{name} vocabulary, {tokens} tokens"
        fit = [setting.fits(f"{what}, {own}", program) for own, program in (("before", before), ("after", after))]
        found = f"{after.temporary / 1e9:.2f} GB after, {before.temporary / 1e9:.2f} before"
        held = after.temporary <= TEMPORARY_ASKED
        numbers = {"after_bytes": after.temporary, "before_bytes": before.temporary}
        setting.ask(f"{what}, temporaries", found, f"at most {TEMPORARY_ASKED / 1e9} GB", held, **numbers)
        if not all(fit):
            continue
        given = [
            jax.device_put(20 * filled(s, n) if n < 2 else filled(s, n) % vocab, place) for n, s in enumerate(shapes)
        ]
        error = relative_error(after.run(*given), before.run(*given))
        setting.row(
            f"{what}, loss and gradients", f"{error:.1e}", f"at most {TOLERANCE:g}", error <= TOLERANCE, error=error
        )
        times = setting.timed(
            {
                "after": lambda given=given, own=after: own.run(*given),
                "before": lambda given=given, own=before: own.run(*given),
            },
            15,
            share=0.4 + 0.4 * number,
        )
        ratio = times["after"].median / times["before"].median
        found = f"{times['after']} after, {times['before']} before: {ratio:.3f}"
        numbers = {own: each.numbers() for own, each in times.items()}
        setting.ask(f"{what}, time", found, "at most 1.0", ratio <= 1.0, ratio=ratio, **numbers)


def ours(size: llama.Size, kernel_VD, x_BTD, targets_BT):
    """The mean cross entropy as the package computes it in a pipeline."""
    loss, weight, _ = llama.head(size).apply(
        {"norm": jnp.ones(size.width, size.dtype), "kernel": kernel_VD}, x_BTD, {"targets": targets_BT}, None
    )
    return loss / weight


def plain(kernel_VD, x_BTD, targets_BT):
    """The same with whole float32 logits, as one writes it first: the backward's products are float32 too."""
    features_BTD = llama.rms_norm(x_BTD, jnp.ones(x_BTD.shape[-1], x_BTD.dtype))
    logits_BTV = jnp.einsum("btd,vd->btv", features_BTD, kernel_VD, preferred_element_type=jnp.float32)
    at_target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits_BTV, axis=-1) - at_target_BT)
