"""The tick of generation: what every device does while groups of sequences go round the ring.

P devices hold the blocks, V stages each. The slots of a data shard are cut into G >= P groups. In each tick every
device runs one of its stages for one *item* and sends it on; after V rounds an item has seen all blocks, and what
comes back to the first device is the next token of each row:

    P=2 V=1 G=2    tick  0    1    2    3    4        a, b groups; a' is a with its next token
    device 0             a0   b0   a'0  b'0  a''0
    device 1             .    a1   b1   a'1  b'1      here the token is drawn: logits stay on the last device

Which group is where follows from the number of the tick: items enter in the first P of every P*V ticks, one after the
other through the groups. No place is ever empty while every group has a sequence to write.

Beside a group every device passes on a place for one *chunk* of a prompt, which enters whenever the place is free. So
long prompts never stop the others (Agrawal et al., 2023, "SARATHI"), and follow each other through the stages. With an
encoder the chunk is the whole source: it goes round once through the encoder's blocks, and then past the decoder's,
each of which takes its keys and values of it.

What a lane computes stands in a conditional and is small; caches are written outside of it. All that is passed on is
one array, so devices meet once in a tick.

Shape legend: R rows of a group, C tokens of a chunk, D d_model, V vocabulary (in suffixes), N slots.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxpipe.infer.loop import books as bk, cache
from jaxpipe.infer.loop.branches import branch_of, branches_of
from jaxpipe.infer.model import Decoder
from jaxpipe.infer.sampling import draw
from jaxpipe.infer.weights import Weights
from jaxpipe.runtime.layout.mesh import TENSOR
from jaxpipe.runtime.layout.relayout import Layout
from jaxpipe.runtime.layout.tree import Tree, tie
from jaxpipe.runtime.loop.transfer import hop


@dataclass(frozen=True)
class Ring:
    """The sizes of a ring, and its tick.

    Attributes:
        weights: Where the blocks are.
        groups: G, of one data shard.
        rows: R.
        length: S, positions of a slot; a multiple of `chunk`.
        chunk: C.
        source_len: Tokens of a source at most; 0 without an encoder.
        cache_dtype: Of keys and values.
        loops: Whether a lane that may be idle is a loop of one turn or none, see `jaxpipe.runtime.loop.lane`.
    """

    weights: Weights
    groups: int
    rows: int
    length: int
    chunk: int
    source_len: int
    cache_dtype: Any
    loops: bool

    @property
    def decoder(self) -> Decoder:
        """The model."""
        return self.weights.decoder

    @property
    def layout(self) -> Layout:
        """Of the decoder's blocks."""
        return self.weights.layout

    @property
    def devices(self) -> int:
        """P."""
        return self.layout.schedule.devices

    @property
    def repeats(self) -> int:
        """V."""
        return self.layout.schedule.repeats

    @property
    def slots(self) -> int:
        """N, of one data shard."""
        return self.groups * self.rows

    @property
    def rounds(self) -> int:
        """How often the chunk of a prompt goes round."""
        return self.repeats + (self.decoder.encoder is not None)

    @property
    def num_rooms(self) -> int:
        """Blocks of the largest stage."""
        return max(self.layout.counts)

    @property
    def period(self) -> int:
        """Ticks in which every group enters once, and everything that is in the ring leaves it."""
        return max(self.devices * self.rounds, self.groups * self.repeats)

    @cached_property
    def shapes(self) -> Tree:
        """Shapes of what one device carries through the loop."""
        decoder, dtype = self.decoder, self.decoder.dtype
        kept = decoder.cache(self.rows, self.length, self.source_len, self.cache_dtype)
        room = {name: [[s] * self.groups] * self.repeats for name, s in kept.items() if s.dtype != bool}
        passed = self.source_len or self.chunk

        def ints(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        return {
            "tick": ints(),
            "empty": ints(),
            "rooms": [room] * self.num_rooms,
            "seen": jax.ShapeDtypeStruct((self.slots, decoder.vocab_size), jnp.bool_),
            "books": bk.empty_books(self.slots, self.length),
            "sources": {"tokens": ints(self.slots, self.source_len), "length": ints(self.slots)},
            "x": jax.ShapeDtypeStruct((self.rows, 1, decoder.d_model), dtype),
            "y": jax.ShapeDtypeStruct((1, passed, decoder.d_model), dtype),
            "note": {
                "tokens": ints(self.rows),
                "positions": ints(self.rows),
                "logprobs": jax.ShapeDtypeStruct((self.rows,), jnp.float32),
                "slot": ints(),
                "round": ints(),
                "offset": ints(),
                "chunk": ints(self.chunk),
                "first": ints(),
                "first_logprob": jax.ShapeDtypeStruct((), jnp.float32),
            },
        }

    def start(self) -> Tree:
        """An empty ring."""
        state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.shapes)
        state["books"]["position"] -= 1
        state["note"]["positions"] -= 1
        state["note"]["slot"] -= 1
        return state

    def tick(self, params: Tree, place, hold, state: Tree) -> Tree:
        """One tick of one device.

        Args:
            params: From `Weights.local`.
            place: The device's place on the pipe.
            hold: Whether decoding waits for all prompts, see `books.to_feed`.
            state: As `shapes` says.
        """
        turn = state["tick"] - place
        lap = jnp.mod(turn, self.devices * self.repeats)
        repeat = lap // self.devices
        entry = (turn // (self.devices * self.repeats)) * self.devices + jnp.mod(lap, self.devices)
        group = jnp.mod(entry, self.groups)
        state = self._enter(params, place, hold, entry, repeat, state)
        note = state["note"]
        slots_R = group * self.rows + jnp.arange(self.rows, dtype=jnp.int32)
        active_R = note["positions"] >= 0
        idle = ~active_R.any() & (note["slot"] < 0)
        state = self._decode(params, place, repeat, group, state)
        state = self._prefill(params, place, state)
        state = self._write(params, place, repeat, slots_R, state)
        return self._send(state | {"tick": state["tick"] + 1, "empty": state["empty"] + idle})

    def _enter(self, params: Tree, place, hold, entry, repeat, state: Tree) -> Tree:
        """On the first device: takes in what came back, lets the next group and chunk in."""
        note, books, first = state["note"], state["books"], place == 0
        enters = first & (repeat == 0)
        rows = jnp.arange(self.rows, dtype=jnp.int32)
        back_R = jnp.mod(entry - self.devices, self.groups) * self.rows + rows
        positions_R = jnp.where(enters, note["positions"], -1)
        books = bk.arrive(books, back_R, positions_R, note["tokens"], note["logprobs"])

        came = note["round"] + first
        done = first & (note["slot"] >= 0) & (came == self.rounds)
        books = self._prompt_done(books, note, done)
        free = first & (done | (note["slot"] < 0))
        needed_N = books["length"] if self.decoder.encoder is None else jnp.ones_like(books["length"])
        step = self.chunk if self.decoder.encoder is None else 1
        slot, offset, given = bk.next_prompt(books, jnp.where(free, needed_N, 0), step)
        books = given

        own_R = jnp.mod(entry, self.groups) * self.rows + rows
        tokens_R, fed_R = bk.to_feed(books, own_R, hold)
        chunk_C = lax.dynamic_slice(books["tokens"], (jnp.maximum(slot, 0), offset), (1, self.chunk))[0]
        note = note | {
            "tokens": jnp.where(enters, tokens_R, note["tokens"]),
            "positions": jnp.where(enters, fed_R, note["positions"]),
            "slot": jnp.where(free, slot, note["slot"]),
            "round": jnp.where(free, 0, came),
            "offset": jnp.where(free, offset, note["offset"]),
            "chunk": jnp.where(free, chunk_C, note["chunk"]),
        }
        x_R1D = self.decoder.embed(params["embed"], note["tokens"][:, None], note["positions"][:, None])
        y_1CD = self._embed_chunk(params, note, state)
        return state | {
            "books": books,
            "note": note,
            "x": self._whole(jnp.where(enters, x_R1D, state["x"])),
            "y": self._whole(jnp.where(free, y_1CD, state["y"])),
        }

    def _prompt_done(self, books: Tree, note: Tree, done) -> Tree:
        """A chunk has gone all the way: its slot begins to decode, if the chunk was the prompt's last."""
        slot = jnp.maximum(note["slot"], 0)
        if self.decoder.encoder is None:
            last = note["offset"] + self.chunk >= books["length"][slot]
            position = jnp.where(done & last, books["length"][slot] - 1, -1)
            return bk.arrive(books, slot[None], position[None], note["first"][None], note["first_logprob"][None])
        begins = done & books["live"][slot]
        position = jnp.where(begins, 0, books["position"][slot])
        return books | {"position": books["position"].at[slot].set(position)}

    def _embed_chunk(self, params: Tree, note: Tree, state: Tree):
        """What enters as a chunk, [1, C, D]: tokens of a prompt, or a source."""
        if self.decoder.encoder is None:
            return self.decoder.embed(params["embed"], note["chunk"][None], self._chunk_positions(note, state))
        slot = jnp.maximum(note["slot"], 0)
        tokens_1N = lax.dynamic_slice_in_dim(state["sources"]["tokens"], slot, 1)
        return self.decoder.embed(params["embed"], tokens_1N, jnp.zeros_like(tokens_1N))

    def _chunk_positions(self, note: Tree, state: Tree):
        """Positions of a chunk's tokens [1, C], -1 behind the prompt's end."""
        positions_C = note["offset"] + jnp.arange(self.chunk, dtype=jnp.int32)
        length = state["books"]["length"][jnp.maximum(note["slot"], 0)]
        return jnp.where(positions_C < length, positions_C, -1)[None]

    def _decode(self, params: Tree, place, repeat, group, state: Tree) -> Tree:
        """One stage for the rows of a group."""
        positions_R, rooms = state["note"]["positions"], state["rooms"]
        nothing = self._zeros(rooms, cache.OWN, self.rows, 1, place)

        def stage(number: int, group: int):
            def run():
                x_R1D, new = state["x"], list(nothing)
                for room, kind, own in self._blocks(params, number):
                    kept = cache.of_group(rooms[room], self._repeat_of(number), group)
                    kept = self._with_mask(kept, state, group * self.rows, self.rows)
                    x_R1D, new[room] = self.decoder.steps[kind](own, x_R1D, kept, positions_R[:, None])
                return self._whole(x_R1D), new

            return run

        active = (positions_R >= 0).any()
        index = jnp.where(active, branch_of(self.layout, repeat, place) * self.groups + group, -1)
        branches = [stage(number, own) for number in branches_of(self.layout) for own in range(self.groups)]
        x_R1D, new = lax.switch(index + 1, [lambda: (state["x"], nothing), *branches])

        def put(leaf, own, here):
            return cache.put_tokens(leaf, jnp.where(here, positions_R, -1), own)

        return state | {"x": x_R1D, "rooms": self._keep(rooms, new, jnp.where(active, repeat, -1), group, put)}

    def _prefill(self, params: Tree, place, state: Tree) -> Tree:
        """One stage for the chunk of a prompt, or for a source."""
        note, encoder = state["note"], self.decoder.encoder
        repeat = note["round"] - (encoder is not None)
        running = note["slot"] >= 0

        def given(loop: Tree) -> Tree:
            y_1CD, rooms = loop["y"], loop["rooms"]
            slot, positions_1C = jnp.maximum(note["slot"], 0), self._chunk_positions(note, state)

            def stage(number: int):
                def run():
                    y, new = y_1CD, list(nothing)
                    for room, kind, own in self._blocks(params, number):
                        if encoder is not None:
                            made = encoder.cross[kind](own, y)
                            new[room] = jax.tree.map(lambda leaf: leaf.astype(self.cache_dtype), made)
                            continue
                        kept = cache.of_slot(rooms[room], self._repeat_of(number), slot)
                        y, new[room] = self.decoder.steps[kind](own, y, kept, positions_1C)
                    return self._whole(y), new

                return run

            names = cache.OWN if encoder is None else ("cross_k", "cross_v")
            nothing = self._zeros(rooms, names, 1, y_1CD.shape[1], place)
            index = branch_of(self.layout, jnp.maximum(repeat, 0), place)
            branches = [stage(number) for number in branches_of(self.layout)]
            if encoder is not None and self.weights.encoder is not None:
                at_encoder = len(branches) + branch_of(self.weights.encoder, 0 * place, place)
                index = jnp.where(repeat < 0, at_encoder, index)
                branches += [
                    lambda n=n: (self._encode(params, n, y_1CD, slot, state), nothing)
                    for n in branches_of(self.weights.encoder)
                ]
            # A conditional in the loop too, though it always runs there: all reads of rooms come before the writes.
            index = jnp.where(running, index + 1, 0)
            y, new = lax.switch(index, [lambda: (y_1CD, nothing), *branches])
            first = note["offset"] if encoder is None else 0

            def put(leaf, own, here):
                return cache.put_chunk(leaf, jnp.where(here, slot % self.rows, -1), first, own)

            at = jnp.where(running, repeat, -1)
            return {"y": y, "rooms": self._keep(rooms, new, at, slot // self.rows, put)}

        loop = {"y": state["y"], "rooms": state["rooms"]}
        return state | (_once(running, given, loop, "y") if self.loops else given(loop))

    def _encode(self, params: Tree, number: int, y_1ND, slot, state: Tree):
        """The encoder's blocks of one device."""
        encoder, layout = self.decoder.encoder, self.weights.encoder
        assert encoder is not None and layout is not None
        seen_1N = self._mask(state, slot, 1)
        for _, kind, own in self._blocks_of(layout, params["encoder"], params["embed"], number):
            y_1ND = encoder.blocks[kind](own, y_1ND, seen_1N)
        return self._whole(y_1ND)

    def _write(self, params: Tree, place, repeat, slots_R, state: Tree) -> Tree:
        """On the last device, behind the last stage: the next token of each row, and the first one after a prompt."""
        note, books, final = state["note"], state["books"], place == self.devices - 1
        positions_R = jnp.where(final & (repeat == self.repeats - 1), note["positions"], -1)
        seen = _mark(state["seen"], slots_R, positions_R[:, None], note["tokens"][:, None])
        slots, positions, x = slots_R, positions_R, state["x"]
        if self.decoder.encoder is None:
            slot = jnp.maximum(note["slot"], 0)
            whole = final & (note["slot"] >= 0) & (note["round"] == self.rounds - 1)
            positions_1C = jnp.where(whole, self._chunk_positions(note, state), -1)
            seen = _mark(seen, slot[None], positions_1C, note["chunk"][None])
            last = books["length"][slot] - 1 - note["offset"]
            ends = whole & (last < self.chunk)
            y_1D = lax.dynamic_index_in_dim(state["y"], jnp.clip(last, 0, self.chunk - 1), 1, keepdims=False)
            x = jnp.concatenate([x, y_1D[None]])
            slots = jnp.concatenate([slots, slot[None]])
            positions = jnp.concatenate([positions, jnp.where(ends, books["length"][slot] - 1, -1)[None]])

        def write(num: int):
            def run():
                settings, active = bk.settings_of(books, slots[:num]), positions[:num] >= 0
                settings["temperature"] = jnp.where(active, settings["temperature"], 0)
                settings["repetition_penalty"] = jnp.where(active, settings["repetition_penalty"], 1)
                logits = self._whole(self.decoder.logits(params["head"], x[:num])[:, 0])
                drawn = draw(logits, settings, seen[slots[:num]], positions[:num] + 1)
                return [jnp.concatenate([own, jnp.zeros(len(slots) - num, own.dtype)]) for own in drawn]

            return run

        def nothing():
            return [jnp.zeros_like(slots), jnp.zeros(slots.shape, jnp.float32)]

        # Most ticks have no prompt's end, and one row more would cost more than its share.
        needed = jnp.where((positions[self.rows :] >= 0).any(), 2, (positions_R >= 0).any().astype(jnp.int32))
        tokens, logprobs = lax.switch(needed, [nothing, write(self.rows), write(len(positions))])
        wrote_R = positions_R >= 0
        note = note | {
            "tokens": jnp.where(wrote_R, tokens[: self.rows], note["tokens"]),
            "logprobs": jnp.where(wrote_R, logprobs[: self.rows], note["logprobs"]),
        }
        if self.decoder.encoder is None:
            note |= {
                "first": jnp.where(positions[-1] >= 0, tokens[-1], note["first"]),
                "first_logprob": jnp.where(positions[-1] >= 0, logprobs[-1], note["first_logprob"]),
            }
        return state | {"note": note, "seen": seen}

    def _send(self, state: Tree) -> Tree:
        """To the next device, as one array: with two, devices would wait for each other twice."""
        parts = {name: state[name] for name in ("x", "y", "note")}
        leaves, tree = jax.tree.flatten(parts)
        words = [_words(leaf) for leaf in leaves]
        moved = hop(jnp.concatenate(words), self.devices, ring=True, step=1)
        starts = [0, *accumulate(map(len, words))]
        came = [_unworded(moved[a:b], leaf) for a, b, leaf in zip(starts, starts[1:], leaves, strict=False)]
        return state | jax.tree.unflatten(tree, came)

    def _repeat_of(self, stage: int) -> int:
        return self.layout.schedule.repeat_of(stage)

    def _blocks(self, params: Tree, stage: int) -> list[tuple[int, str, Tree]]:
        """The decoder's blocks of a stage: the room, kind and weights of each."""
        found = self._blocks_of(self.layout, params["blocks"], params["embed"], stage)
        return [(room, kind, self.weights.upright(own)) for room, kind, own in found]

    def _blocks_of(self, layout: Layout, blocks: list, embed: Tree, stage: int) -> list[tuple[int, str, Tree]]:
        repeat, found = layout.schedule.repeat_of(stage), []
        for room, p in enumerate(layout.places[stage]):
            kind = layout.positions[repeat][p].kind
            found.append((room, kind, tie(blocks[repeat][p], embed, self.decoder.ties_of(f"blocks/{kind}"))))
        return found

    def _with_mask(self, kept: Tree, state: Tree, first, rows: int) -> Tree:
        """A room's slots with what may be seen of their sources, where there is an encoder."""
        return kept if self.decoder.encoder is None else kept | {"memory_mask": self._mask(state, first, rows)}

    def _mask(self, state: Tree, first, rows: int):
        """Which tokens of the sources of some slots there are, bools [rows, N]."""
        lengths = lax.dynamic_slice_in_dim(state["sources"]["length"], first, rows)
        return jnp.arange(self.source_len)[None] < lengths[:, None]

    def _keep(self, rooms: list, new: list, repeat, group, put: Callable[..., Any]) -> list:
        """Writes what is new into the arrays of a repeat and a group, those of no other and none for repeat -1.

        On CPUs in a loop of one turn or none; elsewhere all arrays are written, but where nobody looks.
        """
        rooms = [{name: [list(groups) for groups in arrays] for name, arrays in room.items()} for room in rooms]
        for r in range(self.repeats):
            for g in range(self.groups):
                here = (repeat == r) & (group == g)

                def write(old: list, here=here) -> list:
                    return self._lay(jax.tree.map(partial(put, here=here), old, new))

                old = [{name: room[name][r][g] for name in own} for room, own in zip(rooms, new, strict=True)]
                for room, written in zip(rooms, _once(here, write, old) if self.loops else write(old), strict=True):
                    for name, leaf in written.items():
                        room[name][r][g] = leaf
        return rooms

    def _zeros(self, rooms: list, names: tuple[str, ...], rows: int, tokens: int, place) -> list:
        """What an idle lane adds to rooms: zeros that XLA cannot see to be zero, lest it makes them once and copies
        them.
        """
        zero = jnp.minimum(place, 0).astype(self.cache_dtype)

        def like(leaf):
            return jnp.full((rows, leaf.shape[1], tokens, leaf.shape[3]), zero)

        return [{name: like(room[name][0][0]) for name in names} for room in rooms]

    def _whole(self, x):
        """Whole on each device of `tensor`, as all that is passed on."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.shape.get(TENSOR, 1) == 1:
            return x
        return lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))

    def over_tensor(self, leaf) -> PartitionSpec:
        """How an array of a room [R, K, S, d] lies over `tensor`: cut by heads, or whole if it does not divide them."""
        size = self.weights.mesh.shape.get(TENSOR, 1)
        return PartitionSpec(None, TENSOR) if size > 1 and leaf.shape[1] % size == 0 else PartitionSpec()

    def _lay(self, rooms: list) -> list:
        """Rooms as they lie over `tensor`."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.shape.get(TENSOR, 1) == 1:
            return rooms

        def lay(leaf):
            return lax.with_sharding_constraint(leaf, NamedSharding(mesh, self.over_tensor(leaf)))

        return jax.tree.map(lay, rooms)


def _mark(seen, slots_n, positions_nC, tokens_nC):
    """Notes the tokens of sequences; position -1 has none, and position 0 begins a sequence."""
    begins_n1 = (positions_nC == 0).any(-1, keepdims=True)
    rows_nV = seen[slots_n] & ~begins_n1
    tokens_nC = jnp.where(positions_nC < 0, seen.shape[1], tokens_nC)
    rows_nV = rows_nV.at[jnp.arange(len(slots_n))[:, None], tokens_nC].set(True, mode="drop")
    return seen.at[slots_n].set(rows_nV)


def _once(running, turn: Callable[[Any], Any], values: Any, input: str | None = None) -> Any:
    """``turn(values)`` or the values, as a loop of one turn or none: what a loop carries is updated in place.

    Nothing but a barrier tells XLA that the turn depends on being in the loop: without it, it computes in advance what
    depends on the `input`, which the turn changes in name only. A barrier around a buffer would copy it.
    """

    def body(loop):
        at, values = loop
        if input is not None:
            at, came = lax.optimization_barrier((at, values[input]))
            values = values | {input: came}
        return at + 1, turn(values)

    return lax.while_loop(lambda loop: loop[0] < running.astype(jnp.int32), body, (jnp.int32(0), values))[1]


def _words(x):
    """The bits of an array as a vector of int32."""
    per_word = max(4 // x.dtype.itemsize, 1)
    return jnp.pad(x.reshape(-1), (0, -x.size % per_word)).view(jnp.int32)


def _unworded(words, like):
    """The array that `_words` was given, of that shape and dtype."""
    return words.view(like.dtype)[: like.size].reshape(like.shape)
