"""Where the weights lie while tokens are generated: blocks with their stage, embedding and head on every device.

Blocks rest as in training (`jaxpipe.runtime.layout.relayout`), each an array of its own: a stack of weights sliced by
index would be copied in every tick. Embedding and head are whole on each device of `pipe`, for the first and the last
stage need them in every tick and all devices run one program; over `tensor` they are cut as everything else.

What is only ever used in the dtype of the computation is cast once, here.

On CPUs the kernels of blocks rest turned, [out, in], as products with few rows are fastest: `jaxpipe.infer.few_rows`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.errors import ConfigError
from jaxpipe.infer.model import Decoder
from jaxpipe.plan.chain import Chain
from jaxpipe.plan.partition import partition
from jaxpipe.runtime.layout.casts import cast_dtypes
from jaxpipe.runtime.layout.inputs import check_canonical
from jaxpipe.runtime.layout.mesh import PIPE, TENSOR, settled
from jaxpipe.runtime.layout.relayout import Layout
from jaxpipe.runtime.layout.rest import slashed
from jaxpipe.runtime.layout.tree import Tree, drop_path, get_path, tie
from jaxpipe.runtime.options import stage_counts
from jaxpipe.schedule import build


@dataclass(frozen=True)
class Weights:
    """How the weights of a decoder rest.

    Attributes:
        decoder: The model.
        mesh: The mesh.
        layout: Of the decoder's blocks.
        encoder: Of the encoder's blocks, one stage of them per device; None without an encoder.
        turned: Whether the kernels of the decoder's blocks rest as [out, in].
    """

    decoder: Decoder
    mesh: Mesh
    layout: Layout
    encoder: Layout | None
    turned: bool = False

    def place(self, canonical: Tree) -> Tree:
        """The tree that programs take, from the canonical tree, leaf by leaf.

        Raises:
            PartitionError: The tree has other kinds or another number of blocks than the model.
        """
        blocks = _relaid(self.layout, self._cast(canonical))
        return {
            "ends": self._ends(canonical),
            "blocks": _turn(blocks, _turned) if self.turned else blocks,
            "encoder": _relaid(self.encoder, canonical) if self.encoder else [],
        }

    def specs(self, params: Tree) -> Tree:
        """Partition specs of such a tree, of the axes that programs handle themselves."""
        return {
            "ends": jax.tree.map(lambda _: PartitionSpec(), params["ends"]),
            "blocks": jax.tree.map(lambda _: PartitionSpec(PIPE), params["blocks"]),
            "encoder": jax.tree.map(lambda _: PartitionSpec(PIPE), params["encoder"]),
        }

    def local(self, params: Tree) -> Tree:
        """What one device holds, without the device dim, and the head with its tied leaves."""
        ends = params["ends"]
        head, ties = ends["head"], self.decoder.ties_of("head")
        missing = {to: source for to, source in ties.items() if to not in paths_of(head)}
        blocks, encoder = (jax.tree.map(lambda leaf: leaf[0], params[part]) for part in ("blocks", "encoder"))
        return {"embed": ends["embed"], "head": tie(head, ends["embed"], missing), "blocks": blocks, "encoder": encoder}

    def upright(self, block: Tree) -> Tree:
        """A block's weights from `local` as the model has them. In the conditional that uses them: outside, XLA would
        turn them all before the loop, into copies.
        """
        return _turn(block, jnp.matrix_transpose) if self.turned else block

    def _ends(self, canonical: Tree) -> Tree:
        """Embedding and head; where the head computes in another dtype than a leaf it shares has, a copy of its own."""
        decoder, ties = self.decoder, self.decoder.ties_of("head")
        x = jax.ShapeDtypeStruct((1, 1, decoder.d_model), decoder.dtype)
        head = tie(canonical["head"], canonical["embed"], ties)
        head = _astype(head, cast_dtypes(decoder.logits, _shapes(head), x))
        for to, source in ties.items():
            if get_path(head, to).dtype == get_path(canonical["embed"], source).dtype:
                head = drop_path(head, to)
        tensor = self.mesh.shape.get(TENSOR, 1)

        def put(path, leaf):
            dim = self.decoder.tensor.get(path[0].key, {}).get(slashed(path[1:]))
            cut = dim is not None and leaf.shape[dim] % tensor == 0
            spec = PartitionSpec(*[None] * (dim or 0), TENSOR) if cut and tensor > 1 else PartitionSpec()
            return jax.device_put(leaf, NamedSharding(self.mesh, spec))

        return jax.tree.map_with_path(put, {"embed": canonical["embed"], "head": head})

    def _cast(self, canonical: Tree) -> Tree:
        """The decoder's blocks in the dtypes that they compute with."""
        decoder, blocks = self.decoder, dict(canonical["blocks"])
        x = jax.ShapeDtypeStruct((1, 1, decoder.d_model), decoder.dtype)
        positions = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        cache, embed = decoder.cache(1, 1, 1, None), _shapes(canonical["embed"])
        for kind, step in decoder.steps.items():
            ties = decoder.ties_of(f"blocks/{kind}")
            one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), blocks[kind])

            def run(own, embed, *inputs, step=step, ties=ties):
                return step(tie(own, embed, ties), *inputs)

            blocks[kind] = _astype(blocks[kind], cast_dtypes(run, one, embed, x, cache, positions))
        return {**canonical, "blocks": blocks}


def weights_of(
    decoder: Decoder,
    canonical: Tree,
    mesh: Mesh,
    repeats: int = 1,
    stages: Sequence[int] | str | None = None,
    *,
    turned: bool = False,
) -> Weights:
    """Decides which blocks go where.

    Args:
        decoder: The model.
        canonical: Its parameters, arrays or shapes.
        mesh: The mesh.
        repeats: V.
        stages: Blocks per stage of the decoder, see `jaxpipe.Pipeline`. By default the split whose largest stage reads
            the fewest bytes of weights per token, for that is what a tick waits for: the last stage, which has the
            head, gets fewer blocks.
        turned: Whether the kernels of the decoder's blocks shall rest as [out, in].

    Raises:
        ConfigError: The mesh's `tensor` does not divide the heads.
        PartitionError: The canonical tree has other blocks than the model, or `stages` does not fit.
    """
    tensor = mesh.shape.get(TENSOR, 1)
    if decoder.heads % tensor:
        near = max(n for n in range(1, tensor + 1) if decoder.heads % n == 0)
        raise ConfigError(f"mesh.tensor={tensor} must divide the model's {decoder.heads} heads; try mesh.tensor={near}")
    check_canonical(Counter([*decoder.kinds, *(decoder.encoder.kinds if decoder.encoder else ())]), canonical)
    schedule = build("inference", devices=mesh.shape[PIPE], microbatches=mesh.shape[PIPE], repeats=repeats)
    if stages is None:
        stages = _balanced(decoder, canonical, schedule.stages)
    counts = stage_counts(stages, len(decoder.kinds), schedule)
    layout = Layout(mesh, schedule, decoder.kinds, counts, tensor=decoder.tensor, shard="optimizer")
    if decoder.encoder is None:
        return Weights(decoder, mesh, layout, None, turned)
    once = build("inference", devices=mesh.shape[PIPE], microbatches=mesh.shape[PIPE], repeats=1)
    counts = stage_counts("even", len(decoder.encoder.kinds), once)
    encoder = Layout(mesh, once, decoder.encoder.kinds, counts, tensor=decoder.tensor, shard="optimizer")
    return Weights(decoder, mesh, layout, encoder, turned)


def _balanced(decoder: Decoder, canonical: Tree, stages: int) -> tuple[int, ...]:
    """Blocks per stage, by the weights that a token reads."""
    per_kind = {kind: _size(canonical["blocks"][kind]) / decoder.kinds.count(kind) for kind in decoder.steps}
    head = decoder.vocab_size * decoder.d_model
    return partition(Chain([per_kind[kind] for kind in decoder.kinds], stages, last=head)).counts


def _relaid(layout: Layout, canonical: Tree) -> list:
    """The blocks of a layout in their places."""
    kinds = set(layout.kinds)
    own = {"embed": {}, "head": {}, "blocks": {k: v for k, v in canonical["blocks"].items() if k in kinds}}
    return layout.from_canonical(own)["blocks"]


def _turn(blocks: Tree, turn: Callable[[Any], Any]) -> Tree:
    """The kernels of linear layers turned round, all else as it is."""
    return jax.tree.map_with_path(lambda path, leaf: turn(leaf) if path[-1].key == "kernel" else leaf, blocks)


def _turned(leaf: jax.Array) -> jax.Array:
    """A kernel [P, in, out] as [P, out, in], where it was."""
    rest: Any = leaf.sharding
    pipe, rows, columns = (*rest.spec, None, None, None)[:3]
    sharding = NamedSharding(rest.mesh, PartitionSpec(pipe, columns, rows))
    return settled(jax.jit(jnp.matrix_transpose, out_shardings=sharding)(leaf))


def _astype(tree: Tree, dtypes: Tree) -> Tree:
    return jax.tree.map(lambda leaf, dtype: leaf if leaf.dtype == dtype else leaf.astype(dtype), tree, dtypes)


def _shapes(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def paths_of(tree: Tree) -> list[str]:
    """The slash-separated paths of a tree's leaves."""
    return [slashed(path) for path, _ in jax.tree.leaves_with_path(tree)]


def _size(tree: Tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
