"""The cross entropy over a large vocabulary: the package's against float32 logits that are there as a whole.

Both run in a loop over microbatches with float32 sums and next to nothing but the head in it: "after" the pipeline's on
one device, "before" a plain scan.
"""

import jax
import jax.numpy as jnp

import jaxpipe as jp
from gpu_parts import llama
from gpu_parts.setting import Setting, filled, relative_error
from gpu_parts.tick import step_shapes
from jaxpipe.schedule import build

TOLERANCE = 2e-2
MICROBATCHES = 4

SIZES = {"32k": (32000, 4096, None), "128k": (128256, 8192, 0.5e9)}
"""Vocabulary, tokens of a microbatch, and what the head may need beside slots and sums, in bytes."""


def run(setting: Setting) -> None:
    """Reports on each vocabulary: temporaries, whether both agree, and time."""
    for number, (name, (vocab, tokens, bytes_asked)) in enumerate(SIZES.items()):
        width = 4096
        if setting.quick:
            vocab, tokens, width = vocab // 500, tokens // 256, 32
        size = llama.Size(width=width, heads=1, hidden=1, vocab=vocab, length=tokens)
        _compare(setting, f"{name} vocabulary, {tokens} tokens", size, bytes_asked, 0.4 + 0.4 * number)


def _compare(setting: Setting, what: str, size: llama.Size, bytes_asked: float | None, share: float) -> None:
    schedule = build("1f1b", devices=1, microbatches=MICROBATCHES)
    pipe = jp.Pipeline(_model(size, llama.head(size)), schedule=schedule, mesh=setting.mesh())
    features = (MICROBATCHES, size.length, size.width)
    features = {"features": jax.ShapeDtypeStruct(features, size.dtype, sharding=pipe.batch_sharding)}
    shapes = step_shapes(pipe, llama.batch_shapes(size, MICROBATCHES, pipe.batch_sharding) | features)
    plain = _model(size, jp.HeadLoss(lambda *given: {}, _plain_loss))
    after = setting.compile(pipe.value_and_grad, *shapes)
    before = setting.compile(llama.plain_step(plain, "none", MICROBATCHES), *shapes)
    fit = [setting.fits(f"{what}, {own}", program) for own, program in (("before", before), ("after", after))]
    # What waits between the lanes is no part of the head: slots, two carries, and the features of one microbatch.
    slots = pipe.table.slots
    kept = 2 * size.length * size.width * (slots.activation + 1 + slots.gradient + 2 + 1)
    needs = after.temporary - kept
    found = f"{needs / 1e9:.2f} GB beside slots after, {before.temporary / 1e9:.2f} before"
    numbers = {"after_bytes": after.temporary, "slot_bytes": kept, "before_bytes": before.temporary}
    if bytes_asked is None:
        setting.row(f"{what}, temporaries", found, numbers=numbers)
    else:
        asked = f"at most {bytes_asked / 1e9} GB"
        setting.ask(f"{what}, temporaries", found, asked, needs <= bytes_asked, numbers)
    if not all(fit):
        return
    params = pipe.init(jax.random.key(0), shapes[1])
    batch = {
        n: jax.device_put(filled(s) % size.vocab if n != "features" else filled(s), s.sharding)
        for n, s in shapes[1].items()
    }
    error = relative_error(after.run(params, batch), before.run(params, batch))
    asked = f"at most {TOLERANCE:g}"
    setting.row(f"{what}, loss and gradients", f"{error:.1e}", asked, error <= TOLERANCE, {"error": error})
    times = setting.timed(
        {"after": lambda: after.run(params, batch), "before": lambda: before.run(params, batch)}, 9, share
    )
    ratio = times["after"].median / times["before"].median
    found = f"{times['after']} after, {times['before']} before: {ratio:.3f}"
    numbers = {"ratio": ratio, "microbatches": MICROBATCHES} | {own: each.numbers() for own, each in times.items()}
    setting.ask(f"{what}, {MICROBATCHES} microbatches", found, "at most 1.0", ratio <= 1.0, numbers)


def _model(size: llama.Size, head_loss) -> jp.Model:
    """Features come with the batch, and one block scales them."""

    def scale(*given):
        return {"scale": jnp.ones(size.width, size.dtype)}

    return jp.Model(
        jp.Embed(scale, lambda p, mb, key: mb["features"] * p["scale"][None, None]),
        [jp.Block(scale, lambda p, x, mb, key: x * p["scale"][None, None])],
        head_loss,
    )


def _plain_loss(p, x_BTD, mb, key):
    """Whole float32 logits, as one writes it first: the backward's products are float32 too."""
    features_BTD = llama.rms_norm(x_BTD, p["norm"])
    logits_BTV = jnp.einsum("btd,vd->btv", features_BTD, p["kernel"], preferred_element_type=jnp.float32)
    at_target_BT = jnp.take_along_axis(logits_BTV, mb["targets"][..., None], axis=-1)[..., 0]
    losses_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - at_target_BT
    return losses_BT.sum(), jnp.float32(losses_BT.size)
