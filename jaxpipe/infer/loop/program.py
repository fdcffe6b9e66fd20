"""The ring as programs: all of a generation in one, or a fixed number of ticks at a time with the state kept.

One `shard_map`, manual over `pipe`, `data` and `fsdp`, and over `tensor` where that is one device. What a device
carries is global as ``[P, shards, ...]``: an array is whole in the first two dims, and nothing else of it is anybody
else's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxpipe.infer.loop import books as bk
from jaxpipe.infer.loop.ring import Ring
from jaxpipe.runtime.layout.mesh import BATCH, MANUAL, PIPE, batch_shards, manual_axes
from jaxpipe.runtime.layout.tree import Tree

OWN = PartitionSpec(PIPE, BATCH)
"""Of what a device carries."""


@dataclass(frozen=True)
class Programs:
    """The programs of a ring.

    Attributes:
        ring: The ring.
        params: Shapes of the weights, as `Weights.place` gives them.
    """

    ring: Ring
    params: Tree

    @property
    def shards(self) -> int:
        """Parts that the slots are cut into."""
        return batch_shards(self.ring.weights.mesh)

    @cached_property
    def generate(self) -> Callable[..., dict[str, Any]]:
        """``(params, books, sources) -> out``: everything, from prompts to the last token.

        `books` and `sources` are leaves ``[shards, N, ...]``, see `jaxpipe.infer.loop.books`. The answer has `tokens`,
        `logprobs` [shards, N, S], `count` [shards, N], and of all devices together `ticks` and `empty` [P, shards].
        """

        def device(place, params, books, sources):
            ring = self.ring
            state = ring.start()
            state["books"], state["sources"] = state["books"] | _local(books, 1), _local(sources, 1)
            params = ring.weights.local(params)

            def alive(state):
                mine = (place[0] == 0) & state["books"]["live"].any()
                return lax.psum(mine.astype(jnp.int32), MANUAL) > 0

            def lap(loop):
                state, _ = loop
                state = self._ticks(params, place[0], jnp.bool_(True), state, ring.period)
                return state, alive(state)

            state, _ = lax.while_loop(lambda loop: loop[1], lap, (state, alive(state)))
            return _global(
                _report(state) | {"tokens": state["books"]["tokens"], "logprobs": state["books"]["logprobs"]}
            )

        def program(params, books, sources):
            return self._map(device, (PartitionSpec(BATCH),) * 2, OWN)(self._places, params, books, sources)

        return jax.jit(program)

    @cached_property
    def start(self) -> Callable[[], Tree]:
        """``() -> state``: an empty ring, sharded."""

        def device(place):
            return _global(self.ring.start())

        body: Any = jax.shard_map(
            device,
            mesh=self.ring.weights.mesh,
            in_specs=PartitionSpec(PIPE),
            out_specs=OWN,
            axis_names=manual_axes(self.ring.weights.mesh),
            check_vma=False,
        )
        return jax.jit(lambda: body(self._places), out_shardings=self.shardings)

    @property
    def shardings(self) -> Tree:
        """How the state rests on the mesh."""
        mesh = self.ring.weights.mesh
        own = jax.tree.map(lambda _: NamedSharding(mesh, OWN), self.ring.shapes)

        def room(leaf):
            return NamedSharding(mesh, PartitionSpec(*OWN, *self.ring.over_tensor(leaf)))

        return own | {"rooms": jax.tree.map(room, self.ring.shapes["rooms"])}

    @cached_property
    def _made(self) -> dict[tuple[int, int], Any]:
        """What `steps` has made: engines of equal ticks share it."""
        return {}

    def steps(self, ticks: int, window: int) -> Callable[..., tuple[Tree, dict[str, Any]]]:
        """``(params, state, dismissed, known) -> (state, report)``: so many ticks; the state's memory is used again.

        Args:
            ticks: How many.
            window: Tokens of a slot that are reported.

        Returns:
            The program. `dismissed` are bools [shards, N], see `books.dismiss`; `known` [shards, N] the positions from
            which tokens are reported. The report has `count` and `live` [P, shards, N], and `tokens` and `logprobs`
            [P, shards, N, window], true for the first device.
        """

        def device(place, params, state, dismissed, known):
            state = _local(state, 2)
            books = bk.dismiss(state["books"], dismissed[0])
            state = self._ticks(
                self.ring.weights.local(params), place[0], jnp.bool_(False), state | {"books": books}, ticks
            )
            books, at = state["books"], known[0][:, None] + jnp.arange(window)[None]
            fresh = {name: jnp.take_along_axis(books[name], at, 1, mode="clip") for name in ("tokens", "logprobs")}
            return _global(state), _global(_report(state) | fresh)

        def program(params, state, dismissed, known):
            body = self._map(device, (OWN, PartitionSpec(BATCH), PartitionSpec(BATCH)), (OWN, OWN))
            return body(self._places, params, state, dismissed, known)

        jitted = jax.jit(program, donate_argnums=1, out_shardings=(self.shardings, None))
        return self._made.setdefault((ticks, window), jitted)

    @cached_property
    def admit(self) -> Callable[..., Tree]:
        """``(state, shard, slot, row, source) -> state``: a new sequence in a free slot; memory is used again."""

        def device(shard, state, into, slot, row, source):
            at = jnp.where(shard[0] == into, slot, -1)
            state = _local(state, 2)
            books = bk.admit(state["books"], at, row)
            sources = {
                name: array.at[jnp.where(at < 0, len(array), at)].set(source[name], mode="drop")
                for name, array in state["sources"].items()
            }
            return _global(state | {"books": books, "sources": sources})

        def program(state, into, slot, row, source):
            everywhere = PartitionSpec()
            body: Any = jax.shard_map(
                device,
                mesh=self.ring.weights.mesh,
                in_specs=(PartitionSpec(BATCH), OWN, everywhere, everywhere, everywhere, everywhere),
                out_specs=OWN,
                axis_names=manual_axes(self.ring.weights.mesh),
                check_vma=False,
            )
            return body(jnp.arange(self.shards, dtype=jnp.int32), state, into, slot, row, source)

        return jax.jit(program, donate_argnums=0, out_shardings=self.shardings)

    @property
    def _places(self):
        return jnp.arange(self.ring.devices, dtype=jnp.int32)

    def _map(self, device: Callable, in_specs: tuple, out_specs: Any) -> Any:
        """A function of places, weights and more."""
        weights = self.ring.weights
        return jax.shard_map(
            device,
            mesh=weights.mesh,
            in_specs=(PartitionSpec(PIPE), weights.specs(self.params), *in_specs),
            out_specs=out_specs,
            axis_names=manual_axes(weights.mesh),
            check_vma=False,
        )

    def _ticks(self, params: Tree, place, hold, state: Tree, count: int) -> Tree:
        return lax.scan(lambda s, _: (self.ring.tick(params, place, hold, s), None), state, None, length=count)[0]


def _report(state: Tree) -> dict[str, Any]:
    books = state["books"]
    return {"count": books["count"], "live": books["live"], "ticks": state["tick"], "empty": state["empty"]}


def _local(tree: Tree, dims: int) -> Tree:
    """A device's own part, without the leading dims."""
    return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[dims:]), tree)


def _global(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: leaf[None, None], tree)
