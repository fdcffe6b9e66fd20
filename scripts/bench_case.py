"""The case that the benchmarks time: a GPT, its batch, and its gradient step with no pipeline."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A float32 GPT with learned positions and a head of its own.

    Attributes:
        d_model: Width of the residual stream.
        num_heads: Attention heads.
        num_layers: Blocks.
        seq: Tokens per row.
        rows: Rows per microbatch.
        vocab_size: Different tokens.
    """

    d_model: int = 256
    num_heads: int = 4
    num_layers: int = 8
    seq: int = 128
    rows: int = 2
    vocab_size: int = 256

    def __str__(self):
        return f"gpt d={self.d_model} L={self.num_layers} T={self.seq} rows={self.rows}"


def gpt(case: Case):
    """The `jaxpipe.Model`."""
    from jaxpipe.models.gpt import GPTConfig
    from jaxpipe.train.model import gpt_model

    return gpt_model(
        GPTConfig(
            vocab_size=case.vocab_size,
            max_seq_len=case.seq,
            num_layers=case.num_layers,
            num_heads=case.num_heads,
            d_model=case.d_model,
            tied=False,
        )
    )


def random_batch(case: Case, microbatches: int) -> dict:
    """``tokens`` and ``targets``, int32 [microbatches * rows, seq], always the same."""
    import numpy as np

    rng = np.random.default_rng(0)
    shape = (microbatches * case.rows, case.seq)
    return {name: rng.integers(0, case.vocab_size, shape, dtype=np.int32) for name in ("tokens", "targets")}


def accumulation_step(case: Case):
    """The gradient-accumulation step of the whole model.

    Returns:
        ``(params, step)``: the canonical parameters of key 0, and the jitted ``step(params, groups)``, with groups of
        leaves [M, rows, seq], which returns the sum of the microbatches' gradients and their losses [M].
    """
    import jax

    import jaxpipe as jp

    oracle = jp.sequential(gpt(case), row_groups=1)
    params = oracle.init(jax.random.key(0), random_batch(case, 1))

    @jax.jit
    def step(params, groups):
        def one(grads, mb):
            loss, new = oracle.value_and_grad(params, mb)
            return jax.tree.map(jax.numpy.add, grads, new), loss

        return jax.lax.scan(one, jax.tree.map(jax.numpy.zeros_like, params), groups)

    return params, step


def in_groups(batch: dict, microbatches: int) -> dict:
    """The batch with leaves [M, rows, seq]."""
    return {name: x.reshape(microbatches, -1, *x.shape[1:]) for name, x in batch.items()}
