"""Small models with random weights, and decoding without a cache or a ring: the whole sequence again for each token."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import QUICK

from jaxpipe.infer import Generator
from jaxpipe.models.build import encdec_model, gpt_logits, gpt_model
from jaxpipe.models.encdec import EncDecConfig
from jaxpipe.models.gpt import GPTConfig
from jaxpipe.runtime.layout.mesh import make_mesh
from jaxpipe.runtime.layout.tree import Tree, tie
from jaxpipe.runtime.sequential import sequential

LENGTH, SOURCE = 32, 8
GPT = GPTConfig(vocab_size=37, max_seq_len=LENGTH, num_layers=4, num_heads=2, d_model=16)
ENCDEC = EncDecConfig(
    vocab_size=29,
    num_encoder_layers=3,
    num_decoder_layers=2,
    num_heads=2,
    d_model=12,
    head_dim=6,
    d_ff=20,
    num_buckets=8,
    max_distance=16,
)


@cache
def canonical(cfg: Any) -> Tree:
    """Random parameters, far from their neutral start."""
    model = gpt_model(cfg) if isinstance(cfg, GPTConfig) else encdec_model(cfg)
    batch = {name: jnp.zeros((1, 8), int) for name, needed in model.batch.items() if needed}
    shapes = jax.eval_shape(sequential(model).init, jax.random.key(0), batch)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.4, x.shape), x.dtype), shapes)


def make(cfg: Any, mesh: dict[str, Any], **options: Any) -> Generator:
    """A generator whose program is compiled quickly."""
    own = {"chunk": 4} if isinstance(cfg, GPTConfig) else {"max_source_len": SOURCE}
    options = {"max_len": LENGTH} | own | options
    return quick(Generator(cfg, canonical(cfg), mesh=make_mesh(**mesh), **options))


def quick(gen: Generator) -> Generator:
    """Has the generator's program compiled without optimization: it runs once or twice."""
    program = compile_generate(gen, QUICK)
    gen.programs.__dict__["generate"] = program
    return gen


def compile_generate(gen: Generator, options: Any = None) -> Any:
    """The compiled program of `Generator.generate`."""
    books, sources = gen.books([])
    return gen.programs.generate.lower(gen.params, books, sources).compile(options)


@cache
def _gpt_logits(cfg: GPTConfig):
    return jax.jit(lambda params, tokens: gpt_logits(cfg, params, tokens))


@cache
def _encdec_logits(cfg: EncDecConfig):
    model = encdec_model(cfg)

    @jax.jit
    def logits(params, mb):
        carry, seen = model.embed.apply(params["embed"], mb, None), dict.fromkeys(("encoder", "decoder"), 0)
        for block in model.blocks:
            own = jax.tree.map(lambda leaf, n=seen[block.kind]: leaf[n], params["blocks"][block.kind])
            seen[block.kind] += 1
            carry = block.apply(tie(own, params["embed"], model.block_tie(block.kind)), carry, mb, None)
        head = tie(params["head"], params["embed"], model.head_tie)
        return model.head_loss.features(head, carry, mb, None) @ head["kernel"].T

    return logits


def next_logits(cfg: Any, tokens: list[int], source: list[int] | None = None) -> np.ndarray:
    """The logits [V] of the token that follows, from scratch."""
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(tokens)] = tokens
    if isinstance(cfg, GPTConfig):
        return np.asarray(_gpt_logits(cfg)(canonical(cfg), padded))[0, len(tokens) - 1]
    assert source is not None
    encoder = np.zeros((1, SOURCE), np.int32)
    encoder[0, : len(source)] = source
    mb = {"encoder_tokens": encoder, "encoder_mask": np.arange(SOURCE)[None] < len(source), "tokens": padded}
    return np.asarray(_encdec_logits(cfg)(canonical(cfg), mb))[0, len(tokens) - 1]


def greedy(cfg: Any, prompt: list[int], num: int, source: list[int] | None = None, stops=()) -> list[int]:
    """The likeliest token, again and again."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + num and not set(tokens[len(prompt) :]) & set(stops):
        tokens.append(int(np.argmax(next_logits(cfg, tokens, source))))
    return tokens[len(prompt) :]


def prompts(vocab_size: int, lengths) -> list[list[int]]:
    """Random prompts, always the same."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]
