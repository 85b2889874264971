"""Which entries of a row are chosen, one bit an entry, and where the j-th chosen one is.

Finding places by their rank needs no sort, no scatter and no array as long as the row beside a 32nd of it: bits are counted a word at a
time, the running counts say which word holds the j-th set bit, and five halvings find it there. The last axis is the row,
axes before it are independent.

Traffic of a row of n: n read, n / 32 words written and read, a few words a place.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

_WORD = 32
_COMPARED = 256  # words up to here are compared with a rank all at once, a search takes its steps one after the other
_PIECE = 32  # XLA's CPU compiler unrolls a sum over the last axis up to here, one over 64 takes 80 times as long


def pack(on: Bool[Array, "*rows n"]) -> UInt32[Array, "*rows words"]:
    """The first entry in the lowest bit of the first word; zeros fill the last word."""
    on = jnp.pad(on, [(0, 0)] * (on.ndim - 1) + [(0, -on.shape[-1] % _WORD)])
    on = on.reshape(*on.shape[:-1], on.shape[-1] // _WORD, _WORD).astype(jnp.uint32)
    return (on << jnp.arange(_WORD, dtype=jnp.uint32)).sum(axis=-1, dtype=jnp.uint32)


def unpack(words: UInt32[Array, "*rows words"], n: int) -> Bool[Array, "*rows n"]:
    """The inverse of ``pack``."""
    bits = (words[..., None] >> jnp.arange(_WORD, dtype=jnp.uint32)) & jnp.uint32(1)
    return bits.reshape(*words.shape[:-1], words.shape[-1] * _WORD)[..., :n] != 0


def ones(words: UInt32[Array, "*rows words"]) -> Int[Array, "*rows words"]:
    """How many bits of each word are set."""
    return jax.lax.population_count(words).astype(jnp.int32)


def total(words: UInt32[Array, "*rows words"]) -> Int[Array, "*rows"]:
    """How many bits of each row are set."""
    return ones(words).sum(axis=-1, dtype=jnp.int32)


def count(on: Bool[Array, "*rows n"]) -> Int[Array, "*rows"]:
    """How many are true. By way of ``pack``: a plain sum, on a CPU, writes an int32 an entry first and takes two to five times as long."""
    return total(pack(on))


def places(words: UInt32[Array, "*rows words"], count: int) -> Int[Array, "*rows count"]:
    """The positions of the first ``count`` set bits, ascending; meaningless behind the last one, but inside of the words."""
    rank = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (*words.shape[:-1], count))
    return _place(words, _running(words), rank)


def first(words: UInt32[Array, "*rows words"], count: Int[Array, "*rows"]) -> UInt32[Array, "*rows words"]:
    """The words with no more than the first ``count`` >= 1 set bits of each row left."""
    running = _running(words)
    last = _place(words, running, count[..., None] - 1)
    at, word = last // _WORD, jnp.arange(words.shape[-1], dtype=jnp.int32)
    upto = jnp.where(word == at, ~jnp.uint32(0) >> (_WORD - 1 - last % _WORD).astype(jnp.uint32), jnp.uint32(0))
    return jnp.where(running[..., -1:] > count[..., None], words & jnp.where(word < at, ~jnp.uint32(0), upto), words)


def _running(words: Array) -> Array:
    return jnp.cumsum(ones(words), axis=-1, dtype=jnp.int32)


def _place(words: Array, running: Array, j: Array) -> Array:
    """The position of set bit number ``j`` (from 0), given the running count of ones up to and with each word."""
    at = jnp.minimum(_search(running, j), words.shape[-1] - 1)
    word = jnp.take_along_axis(words, at, axis=-1)
    left = j - (jnp.take_along_axis(running, at, axis=-1) - ones(word))
    bit = jnp.zeros_like(left)
    for half in (16, 8, 4, 2, 1):
        lower = ones(word & jnp.uint32((1 << half) - 1))
        beyond = left >= lower
        left, bit = left - jnp.where(beyond, lower, 0), bit + jnp.where(beyond, half, 0)
        word = jnp.where(beyond, word >> half, word)
    return at * _WORD + bit


def _search(running: Array, j: Array) -> Array:
    """How many running counts are no larger than ``j``, which is the word that holds bit j."""
    if running.shape[-1] <= _COMPARED:
        pieces = (running[..., None, i : i + _PIECE] <= j[..., :, None] for i in range(0, running.shape[-1], _PIECE))
        return sum(piece.sum(axis=-1, dtype=jnp.int32) for piece in pieces)
    search = partial(jnp.searchsorted, side="right")
    for _ in range(running.ndim - 1):
        search = jax.vmap(search)
    return search(running, j).astype(jnp.int32)
