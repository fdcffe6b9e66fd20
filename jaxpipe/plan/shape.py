"""A model as the planner sees it: sizes of its parts, and what follows from them by counting.

All numbers are of one row (one sequence) and of the whole part, before any division over devices. `jaxpipe.train` makes
these values from a run's model; nothing here knows a model's class.

Shape legend: D width of the residual stream, T tokens of a row, H heads, d dims of a head, F hidden dims of the MLP.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Attention:
    """One attention layer, with its projections.

    Attributes:
        queries: Tokens that ask.
        keys: Tokens that are asked.
        heads: H.
        head_dim: d.
        fused: No array holds a score for each query and key.
        rotary: Queries and keys are rotated.
        shared: How many heads of queries share one of keys and values.
        qkv_bias: Whether the maps to queries, keys and values have a bias. None: as the block's other maps.
        norm_params: Parameters of norms on queries and keys.
    """

    queries: int
    keys: int
    heads: int
    head_dim: int
    fused: bool = False
    rotary: bool = False
    shared: int = 1
    qkv_bias: bool | None = None
    norm_params: int = 0

    @property
    def inner(self) -> int:
        """H*d."""
        return self.heads * self.head_dim

    @property
    def kv_inner(self) -> int:
        """Columns of the keys, and of the values."""
        return self.inner // self.shared

    @property
    def rotatable(self) -> int:
        """Numbers in queries and keys of a row."""
        return self.queries * self.inner + self.keys * self.kv_inner

    @property
    def projected(self) -> int:
        """Numbers in queries, keys and values of a row."""
        return self.rotatable + self.keys * self.kv_inner

    def allows(self, tensor: int) -> bool:
        """Whether so many devices can share the layer: they share its heads of queries, and the maps' columns."""
        return self.heads % tensor == 0 and (self.inner + 2 * self.kv_inner) % tensor == 0

    def gathers(self, tensor: int) -> bool:
        """Whether each of so many devices needs all keys and values, because those have too few heads to share."""
        return self.heads // self.shared % tensor != 0

    def own_rotatable(self, tensor: int) -> float:
        """Numbers in queries and keys of a row that each of so many devices has."""
        return self.queries * self.inner / tensor + self._own_keys(tensor)

    def own_projected(self, tensor: int) -> float:
        """Numbers in queries, keys and values of a row that each of so many devices has."""
        return self.own_rotatable(tensor) + self._own_keys(tensor)

    def _own_keys(self, tensor: int) -> float:
        return self.keys * self.kv_inner / (1 if self.gathers(tensor) else tensor)

    def params(self, width: int, bias: bool) -> int:
        """Parameters of the projections and norms.

        Args:
            width: D.
            bias: Whether the block's linear maps have one.
        """
        qkv_bias = bias if self.qkv_bias is None else self.qkv_bias
        maps = (width + qkv_bias) * (self.inner + 2 * self.kv_inner) + (self.inner + bias) * width
        return maps + self.norm_params

    @property
    def scores(self) -> int:
        """Numbers in the score matrices of a row."""
        return self.heads * self.queries * self.keys


@dataclass(frozen=True)
class Mlp:
    """An MLP, or a mixture of them.

    Attributes:
        hidden: F.
        gated: Whether there is a second matrix to F.
        experts: How many MLPs; 0 for one that is not a mixture.
        places: Tokens that all experts together compute, per row; used for mixtures.
    """

    hidden: int
    gated: bool = False
    experts: int = 0
    places: int = 0

    @property
    def matrices(self) -> int:
        """How many matrices one MLP has."""
        return 3 if self.gated else 2


@dataclass(frozen=True)
class BlockShape:
    """One kind of block: attentions, then an MLP, each behind a norm.

    Attributes:
        kind: Its name.
        width: D.
        tokens: Tokens of the residual stream that the block works on.
        attentions: Its attention layers.
        mlp: Its MLP.
        bias: Whether linear layers have one.
        norm_params: Parameters of one norm, in units of D: 2 with a bias, else 1.
    """

    kind: str
    width: int
    tokens: int
    attentions: tuple[Attention, ...]
    mlp: Mlp
    bias: bool = True
    norm_params: int = 2

    @property
    def params(self) -> int:
        """Parameters of one block."""
        bias, wide, hidden = int(self.bias), self.width, self.mlp.hidden
        attention = sum(a.params(wide, self.bias) for a in self.attentions)
        mlp = (wide + bias) * hidden * (self.mlp.matrices - 1) + (hidden + bias) * wide
        experts = self.mlp.experts
        mlps = experts * mlp + wide * experts if experts else mlp
        return attention + mlps + (len(self.attentions) + 1) * self.norm_params * wide

    @property
    def mlp_tokens(self) -> int:
        """Tokens that the MLP's products see, per row."""
        return self.mlp.places if self.mlp.experts else self.tokens

    @property
    def linear_flops(self) -> int:
        """Operations of the products with weights, forward; each half of the backward takes as many."""
        wide = self.width
        attention = sum(2 * wide * (a.projected + a.queries * a.inner) for a in self.attentions)
        router = 2 * wide * self.mlp.experts * self.tokens
        return attention + router + 2 * wide * self.mlp.hidden * self.mlp.matrices * self.mlp_tokens

    @property
    def score_flops(self) -> int:
        """Operations of the two products without weights, forward; the input gradient takes twice as many."""
        return sum(4 * a.scores * a.head_dim for a in self.attentions)


@dataclass(frozen=True)
class ModelShape:
    """A model: its blocks in order, and its ends.

    Attributes:
        kinds: The kind of every block, in order.
        blocks: The shape of every kind.
        width: D.
        vocab: V.
        carry_tokens: Tokens that hop from stage to stage, per row.
        head_tokens: Tokens whose logits are computed, per row.
        seq_len: Tokens that count, per row, for tokens per second.
        embed_params: Parameters of the embedding, the table included.
        head_params: Parameters of the head that are not the embedding's.
        tied: Whether the head uses the embedding's table.
        dtype: Of the computation.
        param_dtype: Of the parameters.
        attention: Which attention is taken and why, in a few words.
        fields: What a measured profile must agree on, by name: the model's own options.
        logits_at_once: How many logits a device computes at once, in chunks of tokens; None: those of a microbatch.
    """

    kinds: tuple[str, ...]
    blocks: Mapping[str, BlockShape]
    width: int
    vocab: int
    carry_tokens: int
    head_tokens: int
    seq_len: int
    embed_params: int
    head_params: int
    tied: bool
    dtype: str
    param_dtype: str
    fields: Mapping[str, object]
    logits_at_once: int | None = None
    attention: str = ""

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a number in the computation."""
        return DTYPE_BYTES[self.dtype]

    @property
    def param_bytes(self) -> int:
        """Bytes of a parameter at rest."""
        return DTYPE_BYTES[self.param_dtype]

    @property
    def params(self) -> int:
        """Parameters of the model; a tied table counts once."""
        return self.embed_params + self.head_params + sum(self.blocks[kind].params for kind in self.kinds)

    @property
    def head_flops(self) -> int:
        """Operations of the logits, forward."""
        return 2 * self.width * self.vocab * self.head_tokens

    def head_chunks(self, rows: int, tensor: int = 1) -> int:
        """In how many chunks the logits of a microbatch are computed.

        Args:
            rows: Of the microbatch.
            tensor: Devices that share every logit's row.
        """
        if self.logits_at_once is None:
            return 1
        return ceil(rows * self.head_tokens / max(1, self.logits_at_once * tensor // self.vocab))

    @property
    def flops_per_row(self) -> int:
        """Operations that one training step needs for a row: forward and backward, nothing computed twice."""
        blocks = sum(self.blocks[kind].linear_flops + self.blocks[kind].score_flops for kind in self.kinds)
        return 3 * (blocks + self.head_flops)
