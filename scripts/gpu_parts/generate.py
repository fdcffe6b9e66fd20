"""Tokens per second: the ring of one device against a plain loop of the same layers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_parts.newer import import_nnx
from gpu_parts.setting import Setting, failed

PROMPT, NEW, ROWS = 128, 128, 8


def run(setting: Setting) -> None:
    """Reports on GPT-2 124M and on a model of the shapes of Llama 7B, both with random weights in bfloat16."""
    if note := import_nnx():
        setting.row("flax", note)
    from jaxpipe.models.gpt_config import PRESETS, GPTConfig

    llama = {"positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "tied": False}
    sizes = {"d_model": 4096, "d_ff": 11008, "num_heads": 32, "num_layers": 32, "vocab_size": 32000}
    configs = {
        "GPT-2 124M": replace(PRESETS["gpt2-124m"], dtype="bfloat16"),
        "7B": GPTConfig(max_seq_len=PROMPT + NEW, dtype="bfloat16", **sizes, **llama),  # pyright: ignore[reportArgumentType]
    }
    if setting.quick:
        toy = {"num_layers": 2, "num_heads": 2, "d_model": 32, "vocab_size": 64}
        configs = {name: replace(cfg, **toy, d_ff=64, dtype="float32") for name, cfg in configs.items()}
    for number, (name, cfg) in enumerate(configs.items()):
        try:
            _measure(setting, name, cfg, 0.3 + 0.6 * number)
        except Exception as error:
            setting.row(name, failed(error), "runs", False)


def _measure(setting: Setting, name: str, cfg: Any, share: float) -> None:
    from jaxpipe.infer import Generator, Sampling

    prompt, new, rows = (8, 8, 2) if setting.quick else (PROMPT, NEW, ROWS)
    made: list[Any] = []

    def place(canonical):
        made.append(Generator(
            cfg, canonical, mesh=setting.mesh(), rows=rows, max_len=prompt + new, chunk=prompt, kernel_first=False
        ))
        return made[-1].params

    shapes = canonical_shapes(cfg)
    params = jax.eval_shape(place, shapes) if setting.compile_only else place(random_weights(shapes))
    (gen,) = made
    whole = jax.sharding.NamedSharding(gen.mesh, jax.sharding.PartitionSpec())
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), params)
    prompts = np.random.default_rng(0).integers(0, cfg.vocab_size, (rows, prompt))
    books = {n: gen.books([gen.check(p, Sampling(max_new_tokens=n)) for p in prompts.tolist()]) for n in (1, new)}
    tokens = jnp.asarray(prompts, jnp.int32)
    placed_tokens = jax.ShapeDtypeStruct(tokens.shape, tokens.dtype, sharding=whole)
    placed_books = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), books[new])
    ring = setting.compile(gen.programs.generate, given, *placed_books)
    plain = {n: setting.compile(plain_loop(gen, n), given, placed_tokens) for n in (1, new)}
    if not all([setting.fits(f"{name}, ring", ring), setting.fits(f"{name}, plain", plain[new])]):
        return
    runs: dict[str, Callable[[], Any]] = {}
    for n in (1, new):
        placed = jax.device_put(books[n], whole)
        runs[f"ring {n}"] = lambda placed=placed: ring.run(params, *placed)
        runs[f"plain {n}"] = lambda n=n: plain[n].run(params, tokens)
    alike = float(np.mean(_written(runs[f"ring {new}"](), prompt, new, rows) == np.asarray(runs[f"plain {new}"]())))
    setting.row(f"{name}, tokens that are those of the plain loop", f"{alike:.0%}", alike=alike)
    times = setting.timed(runs, 5, share)
    speed = {}
    for own in ("ring", "plain"):
        decode_s = times[f"{own} {new}"].median - times[f"{own} 1"].median
        speed[own] = rows * (new - 1) / decode_s
    found = f"{speed['ring']:.0f} over {speed['plain']:.0f}: {speed['ring'] / speed['plain']:.3f}"
    numbers = {key: each.numbers() for key, each in times.items()}
    setting.row(f"{name}, {rows} sequences, tokens per second of the ring over plain", found, **speed, times=numbers)


def canonical_shapes(cfg: Any) -> Any:
    """Shapes of a GPT's canonical parameters, in the dtype of the computation."""
    from flax import nnx

    from jaxpipe.models import gpt
    from jaxpipe.nn.nnx_part import params_of

    def parts():
        with nnx.use_eager_sharding(False):
            made = (make(cfg, rngs=nnx.Rngs(0)) for make in (gpt.Embed, gpt.Block, gpt.Head))
            return tuple(map(params_of, made))

    embed, block, head = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(cfg.dtype)), jax.eval_shape(parts)
    )
    stacked = jax.tree.map(lambda s: jax.ShapeDtypeStruct((cfg.num_layers, *s.shape), s.dtype), block)
    head = {name: leaf for name, leaf in head.items() if not (cfg.tied and name == "kernel")}
    return {"embed": embed, "blocks": {"block": stacked}, "head": head}


def random_weights(shapes: Any) -> Any:
    """Normal numbers, made on the device."""
    make = jax.jit(lambda key, s: (0.02 * jax.random.normal(key, s.shape, s.dtype)).astype(s.dtype), static_argnums=1)
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, [make(jax.random.key(n), leaf) for n, leaf in enumerate(leaves)])


def plain_loop(gen: Any, new: int) -> Callable[[Any, Any], Any]:
    """``(params, tokens [R, T]) -> tokens [R, new]``, greedy: prompts in one go, then one token of all rows at a time.

    Args:
        gen: A generator on one device, whose layers and parameters are used.
        new: Tokens to write.
    """
    ring = gen.ring
    decoder, weights = ring.decoder, ring.weights

    def program(params, tokens_RT):
        (R, T), own = tokens_RT.shape, weights.local(params)
        shapes = decoder.cache(R, ring.length, 0, ring.cache_dtype)
        caches = [{name: jnp.zeros(s.shape, s.dtype) for name, s in shapes.items()} for _ in decoder.kinds]

        def write(caches, tokens_RC, at):
            C = tokens_RC.shape[1]
            positions_RC = jnp.broadcast_to(at + jnp.arange(C, dtype=jnp.int32)[None], (R, C))
            x_RCD, kept = decoder.embed(own["embed"], tokens_RC, positions_RC), []
            for cache, kind, block in zip(caches, decoder.kinds, own["blocks"][0], strict=True):
                x_RCD, made = decoder.steps[kind](block, x_RCD, cache, positions_RC)
                kept.append({
                    name: jax.lax.dynamic_update_slice(cache[name], leaf.astype(cache[name].dtype), (0, 0, at, 0))
                    for name, leaf in made.items()
                })
            logits_RV = decoder.logits(own["head"], x_RCD[:, -1:])[:, 0]
            return kept, jnp.argmax(logits_RV, axis=-1).astype(jnp.int32)

        def turn(state, at):
            caches, token_R = state
            return write(caches, token_R[:, None], at), token_R

        state = write(caches, tokens_RT, 0)
        (_, last_R), written_NR = jax.lax.scan(turn, state, T + jnp.arange(new - 1, dtype=jnp.int32))
        return jnp.concatenate([written_NR, last_R[None]]).T

    return program


def _written(out: Any, prompt: int, new: int, rows: int) -> np.ndarray:
    """The tokens that the ring wrote, [rows, new]."""
    return np.asarray(out["tokens"])[0].reshape(rows, -1)[:, prompt : prompt + new]
