"""A mixture of experts: E MLPs side by side, each token sent to the K that a router likes best for it.

An expert takes C tokens of one sequence at most (``GPTConfig.expert_capacity``), so that all shapes are static; a token
that finds an expert full skips it, and only the residual carries it on. Differences from Switch and GShard, all for one
end, that a result is a function of nothing it should not depend on:

- Sequences never compete: the places are per sequence. How the batch is cut into microbatches changes nothing but the
  auxiliary losses, which are means over one row group.
- Earlier tokens come first, whatever the rank of the choice (GShard serves all first choices first). So a token's
  logits do not depend on later tokens, also where places run out.
- Tokens move to places and back by gathers, not by products with one-hot matrices: no arithmetic is spent on it.

Shape legend: B rows, T positions, D d_model, E experts, K experts per token, C places of an expert, F hidden dims.

Source: Shazeer et al., 2017, "Outrageously Large Neural Networks"; Lepikhin et al., 2020, "GShard"; Fedus et al., 2021,
"Switch Transformers"; Zoph et al., 2022, "ST-MoE".
"""

import jax
import jax.numpy as jnp

from jaxpipe.flax_nnx import nnx
from jaxpipe.models.gpt_config import GPTConfig
from jaxpipe.models.layers import cut, normal


class MoE(nnx.Module):
    """E MLPs of the config's kind and a router without bias. One expert is the dense MLP exactly.

    `router` is [D, E]; `fc` and, for ``swiglu``, `gate` are [E, D, F], `proj` [E, F, D]; their biases, if any, [E, F]
    and [E, D].
    """

    def __init__(self, cfg: GPTConfig, *, rngs: nnx.Rngs):
        D, E, F, std, dtype = cfg.d_model, cfg.num_experts, cfg.hidden_dim, cfg.init_std, cfg.param_dtype
        self.cfg = cfg
        self.router = nnx.Param(normal(rngs, (D, E), std=std, dtype=dtype))
        self.fc = cut(normal(rngs, (E, D, F), std=std, dtype=dtype), dim=2)
        self.proj = cut(normal(rngs, (E, F, D), std=cfg.residual_init_std, dtype=dtype), dim=1)
        self.gate = self.fc_bias = self.gate_bias = self.proj_bias = nnx.data(None)
        if cfg.mlp == "swiglu":
            self.gate = cut(normal(rngs, (E, D, F), std=std, dtype=dtype), dim=2)
        if cfg.bias:
            self.fc_bias, self.proj_bias = cut(jnp.zeros((E, F), dtype), dim=1), nnx.Param(jnp.zeros((E, D), dtype))
            if self.gate is not None:
                self.gate_bias = cut(jnp.zeros((E, F), dtype), dim=1)

    def __call__(self, x_BTD, capacity: int | None = None):
        """[B, T, D] -> [B, T, D] and the auxiliary scalars; by default with the config's capacity.

        The scalars are ``loss``, the weighted sum that joins the loss, and without gradients ``balance_loss``,
        ``z_loss`` and ``drop_rate``, the share of choices that find their expert full.
        """
        cfg, (B, T, D) = self.cfg, x_BTD.shape
        E, K, C = cfg.num_experts, cfg.experts_per_token, cfg.expert_capacity(T) if capacity is None else capacity
        logits_BTE = self.scores(x_BTD)
        gates_BTK, experts_BTK = choose(jax.nn.softmax(logits_BTE, axis=-1), K)
        balance, z = balance_loss(logits_BTE, experts_BTK), z_loss(logits_BTE)
        loss = cfg.aux_loss_weight * balance + (cfg.router_z_weight * z if cfg.router_z_weight else 0.0)
        place_BTK = places(experts_BTK, E, C)
        watched = {"balance_loss": balance, "z_loss": z, "drop_rate": (place_BTK == E * C).mean(dtype=loss.dtype)}
        aux = {"loss": loss} | jax.lax.stop_gradient(watched)
        y_BPD = self.experts(to_places(x_BTD, place_BTK, E * C).reshape(B, E, C, D)).reshape(B, E * C, D)
        y_BTKD = _take(y_BPD, place_BTK.reshape(B, T * K)).reshape(B, T, K, D)
        return (gates_BTK[..., None] * y_BTKD).sum(2).astype(x_BTD.dtype), aux

    def scores(self, x_BTD):
        """The router's logits [B, T, E], in float32 or wider throughout."""
        wide = self.cfg.wide_dtype
        x_BTD, router_DE = x_BTD.astype(wide), self.router[...].astype(wide)
        return jnp.einsum("btd,de->bte", x_BTD, router_DE, precision=jax.lax.Precision.HIGHEST)

    def experts(self, x_BECD):
        """Every expert on its own places, [B, E, C, D] -> [B, E, C, D]."""
        h_BECF = self._linear(x_BECD, self.fc, self.fc_bias)
        if self.gate is None:
            h_BECF = jax.nn.gelu(h_BECF, approximate=True)
        else:
            h_BECF = jax.nn.silu(self._linear(x_BECD, self.gate, self.gate_bias)) * h_BECF
        return self._linear(h_BECF, self.proj, self.proj_bias)

    def _linear(self, x_BECi, kernel, bias):
        y_BECo = jnp.einsum("beci,eio->beco", x_BECi, kernel[...].astype(self.cfg.dtype))
        return y_BECo if bias is None else y_BECo + bias[...].astype(self.cfg.dtype)[None, :, None]


def choose(probs_BTE, num: int):
    """The experts of each token, best first, and what each one's answer counts.

    Args:
        probs_BTE: The router's softmax.
        num: K.

    Returns:
        ``(gates_BTK, experts_BTK)``. For K=1 the gate is the probability itself (Switch), which is how the router
        learns; for K>1 the K probabilities are scaled to sum 1 (GShard, Mixtral).
    """
    gates_BTK, experts_BTK = jax.lax.top_k(probs_BTE, num)
    return (gates_BTK / gates_BTK.sum(-1, keepdims=True) if num > 1 else gates_BTK), experts_BTK


def places(experts_BTK, num_experts: int, capacity: int):
    """Where each choice goes among the E*C places of its sequence: ``expert * C + its rank in the expert's queue``.

    Args:
        experts_BTK: The experts of each token, distinct for one token.
        num_experts: E.
        capacity: C.

    Returns:
        Integers [B, T, K]; E*C for a choice that finds its expert full.

    Example:
        >>> places(jnp.array([[[1], [0], [1], [1]]]), num_experts=2, capacity=2)[0, :, 0].tolist()
        [2, 0, 3, 4]
    """
    chosen_BTE = jax.nn.one_hot(experts_BTK, num_experts, dtype=jnp.int32).sum(2)
    before_BTE = jnp.cumsum(chosen_BTE, axis=1) - chosen_BTE
    rank_BTK = jnp.take_along_axis(before_BTE, experts_BTK, axis=2)
    return jnp.where(rank_BTK < capacity, experts_BTK * capacity + rank_BTK, num_experts * capacity)


def to_places(x_BTD, place_BTK, num_places: int):
    """Tokens in their places, [B, num_places, D]; a place that nobody takes holds zeros."""
    B, T, K = place_BTK.shape
    token_BTK = jnp.broadcast_to(jnp.arange(T)[None, :, None], place_BTK.shape)
    rows_B1 = jnp.arange(B)[:, None]
    token_BP = (
        jnp.full((B, num_places), T)
        .at[rows_B1, place_BTK.reshape(B, T * K)]
        .set(token_BTK.reshape(B, T * K), mode="drop")
    )
    return _take(x_BTD, token_BP)


def balance_loss(logits_BTE, experts_BTK):
    """The load-balancing loss of one row group: ``E * sum_e f_e * P_e``, 1 for an even load.

    f_e is the share of all choices that fell on expert e, before any was dropped, and P_e its mean probability; only
    P_e has a gradient.

    Args:
        logits_BTE: The router's.
        experts_BTK: The choices.

    Source: Fedus et al., 2021, equations 4 to 6, there for K=1 and with the weight alpha, here the config's.
    """
    num_experts = logits_BTE.shape[-1]
    share_E = jax.nn.one_hot(experts_BTK, num_experts, dtype=logits_BTE.dtype).mean((0, 1, 2))
    return num_experts * jnp.sum(share_E * jax.nn.softmax(logits_BTE, axis=-1).mean((0, 1)))


def z_loss(logits_BTE):
    """The mean square of the log of the softmax's denominator, which keeps the router's logits small.

    Source: Zoph et al., 2022, equation 5.
    """
    return jnp.mean(jax.nn.logsumexp(logits_BTE, axis=-1) ** 2)


def _take(x_BND, index_BM):
    """Rows of x, [B, M, D]; zeros where the index is N or more."""
    return jnp.take_along_axis(x_BND, index_BM[..., None], axis=1, mode="fill", fill_value=0)
