"""Tokens per second: the ring of one device against a plain loop of the same layers."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
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
        toy = {"num_layers": 1, "num_heads": 2, "d_model": 32, "d_ff": 64, "vocab_size": 64}
        configs = {"toy": replace(configs["7B"], **toy, dtype="float32")}
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
        made.append(
            Generator(
                cfg, canonical, mesh=setting.mesh(), rows=rows, max_len=prompt + new, chunk=prompt, kernel_first=False
            )
        )
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
    prefill, decode = plain_loop(gen, new)
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), jax.eval_shape(prefill, given, placed_tokens)
    )
    first, rest = setting.compile(prefill, given, placed_tokens), setting.compile(decode, given, state)
    if not all([setting.fits(f"{name}, ring", ring), setting.fits(f"{name}, plain", rest)]):
        return
    started = first.run(params, tokens)
    runs: dict[str, Callable[[], Any]] = {"plain": lambda: rest.run(params, started)}
    for n, own in jax.device_put(books, whole).items():
        runs[f"ring {n}"] = partial(ring.run, params, *own)
    alike = float(np.mean(_written(runs[f"ring {new}"](), prompt, new, rows) == np.asarray(runs["plain"]())))
    setting.row(f"{name}, tokens that are those of the plain loop", f"{alike:.0%}", numbers={"alike": alike})
    times = setting.timed(runs, 5, share)
    decode_s = {"ring": times[f"ring {new}"].median - times["ring 1"].median, "plain": times["plain"].median}
    speed = {own: rows * (new - 1) / seconds for own, seconds in decode_s.items()}
    found = f"{speed['ring']:.0f} over {speed['plain']:.0f}: {speed['ring'] / speed['plain']:.3f}"
    numbers = {key: each.numbers() for key, each in times.items()}
    what = f"{name}, {rows} sequences, tokens per second of the ring over plain"
    setting.row(what, found, numbers={**speed, "times": numbers})


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


def plain_loop(gen: Any, new: int) -> tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]:
    """A greedy loop with nothing around the layers: all prompts in one go, then one token of all rows at a time.

    Args:
        gen: A generator on one device, whose layers and parameters are used.
        new: Tokens to write, one of them by the first program.

    Returns:
        ``(params, prompts [R, T]) -> state`` and ``(params, state) -> tokens [R, new]``.
    """
    ring = gen.ring
    decoder, weights = ring.decoder, ring.weights

    def write(own, caches, tokens_RC, at):
        R, C = tokens_RC.shape
        positions_RC = jnp.broadcast_to(at + jnp.arange(C, dtype=jnp.int32)[None], (R, C))
        x_RCD, kept = decoder.embed(own["embed"], tokens_RC, positions_RC), []
        for cache, kind, block in zip(caches, decoder.kinds, own["blocks"][0], strict=True):
            x_RCD, made = decoder.steps[kind](block, x_RCD, cache, positions_RC)
            made = {name: leaf.astype(cache[name].dtype) for name, leaf in made.items()}
            kept.append({n: jax.lax.dynamic_update_slice(cache[n], leaf, (0, 0, at, 0)) for n, leaf in made.items()})
        logits_RV = decoder.logits(own["head"], x_RCD[:, -1:])[:, 0]
        return kept, jnp.argmax(logits_RV, axis=-1).astype(jnp.int32)

    def prefill(params, prompts_RT):
        R, T = prompts_RT.shape
        shapes = decoder.cache(R, ring.length, 0, ring.cache_dtype)
        caches = [{name: jnp.zeros(s.shape, s.dtype) for name, s in shapes.items()} for _ in decoder.kinds]
        return *write(weights.local(params), caches, prompts_RT, 0), jnp.int32(T)

    def decode(params, state):
        caches, token_R, first = state
        own = weights.local(params)

        def turn(loop, at):
            caches, token_R = loop
            return write(own, caches, token_R[:, None], at), token_R

        places = first + jnp.arange(new - 1, dtype=jnp.int32)
        (_, last_R), written_NR = jax.lax.scan(turn, (caches, token_R), places)
        return jnp.concatenate([written_NR, last_R[None]]).T

    return prefill, decode


def _written(out: Any, prompt: int, new: int, rows: int) -> np.ndarray:
    """The tokens that the ring wrote, [rows, new]."""
    return np.asarray(out["tokens"])[0].reshape(rows, -1)[:, prompt : prompt + new]
