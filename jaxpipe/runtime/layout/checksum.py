"""A checksum of an array that does not depend on how it is sharded.

Every element is mixed with its place in the whole array, and the mixed words are added up modulo 2^32: a sum of
integers is exact in any order, so each device adds up its own shard and no host needs the array. Two sums with
different mixing make 64 bits; a changed bit, two exchanged elements or a shard in the wrong place change them.
"""

import jax
import jax.numpy as jnp
import numpy as np

SEEDS = (0x9E3779B9, 0x7F4A7C15)
PIECE = 2**20
"""Words of an array that `host_checksum` adds up at once."""


@jax.jit
def checksum(x: jax.Array) -> jax.Array:
    """The checksum of an array, uint32 ``[2]``. Nothing of the array's size is made, and it is traced once per shape.

    Args:
        x: Floats, integers or bools of any shape.
    """
    words = _words(x)
    place = jnp.zeros(words.shape, jnp.uint32)
    for dim, size in enumerate(words.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
    return jnp.stack([jnp.sum(own, dtype=jnp.uint32) for own in _sums(words, place)])


def host_checksum(x: np.ndarray) -> np.ndarray:
    """The checksum of an array of NumPy, uint32 ``[2]``: piece by piece, by one program for all shapes.

    Args:
        x: Floats, integers or bools of any shape.
    """
    words = np.ascontiguousarray(x).reshape(-1).view(f"<u{min(x.dtype.itemsize, 4)}")
    sums = np.zeros(2, np.uint32)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for start in range(0, len(words), PIECE):
            sums += _piece_checksum(words[start : start + PIECE], start)
    return sums


def _piece_checksum(words: np.ndarray, start: int) -> np.ndarray:
    """What a piece adds to the checksum of an array in which it begins at `start`."""
    whole = np.pad(words, (0, PIECE - len(words))) if len(words) < PIECE else words
    return np.asarray(_padded_checksum(whole, np.uint32(start % 2**32), np.uint32(len(words))))


@jax.jit
def _padded_checksum(words, start, count):
    at = jnp.arange(PIECE, dtype=jnp.uint32)
    sums = _sums(words.astype(jnp.uint32), start + at)
    return jnp.stack([jnp.sum(jnp.where(at < count, own, 0), dtype=jnp.uint32) for own in sums])


def _sums(words, place):
    """The mixed words, for each of the two seeds."""
    return [_mix(words ^ _mix(place + np.uint32(seed))) for seed in SEEDS]


def as_text(sums) -> str:
    """A checksum as 16 hexadecimal digits."""
    first, second = (int(number) for number in np.asarray(sums))
    return f"{first:08x}{second:08x}"


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array as uint32; elements of 8 bytes become two."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if x.dtype.itemsize >= 4:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint8).astype(jnp.uint32)


def _mix(h: jax.Array) -> jax.Array:
    """Every bit of a word decides about every bit of the result.

    Source:
        Appleby 2011, the finalizer of MurmurHash3 for 32 bits.
    """
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
