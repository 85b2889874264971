"""Exact top-k in two levels: maxima of groups first, then the entries of the groups with the largest ones.

Algorithm. Rows are cut into consecutive groups of g. An entry among the k largest lies in a group whose maximum is among the k
largest maxima (of equal entries the lower index wins, and so does the lower group). A few more groups than k do no harm, so a value is
looked for by halving (``threshold.enclose``) that at least k and at most ``slots(k)`` maxima reach; if so many are
equal that there is none, the first of the equal ones are taken. The groups are found by their rank (``marks.py``), in the order of
their index, and with their entries the same is done again: no more than ``slots(k)`` candidates are left for ``lax.top_k``, which
puts k of them in order.

Where the maxima are many, the halvings begin on maxima of the maxima: on normal entries about ten are made there, and none or one after.

Traffic of a row of N, in entries: N read (and copied once where g does not divide it); N / g written and read a few times, once a
halving (at most 32 in float32); g slots(k) gathered, read a few times; the rest is of the size of k.

Range: N >= 4 k, any float dtype, any platform; sorts ``slots(k)`` entries a row.

Maxima are taken over order-preserving integer keys: a floating maximum may return either of 0.0 and -0.0 and does not
order NaN by sign, either of which would break the exact order in rare rows.

Measurement: README.md.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from dlmscope_jax.kernels import keys
from dlmscope_jax.kernels.dispatch import Problem

from . import marks, reference
from .threshold import Bracket, enclose


def group_size(width: int, k: int) -> int:
    """The power of two next to sqrt(N / slots(k)), from 1 to 32: beyond, XLA's CPU compiler no longer unrolls a maximum."""
    return 2 ** min(5, max(0, round(math.log2(width / slots(k)) / 2)))


def slots(k: int) -> int:
    """How many groups, and how many candidates, are kept at most."""
    return k + max(16, k // 2)


def refuses(problem: Problem, platform: str) -> str | None:
    """Two levels leave at most half of the entries from N = 4 k on."""
    if problem.width >= 4 * problem.k:
        return None
    return f"needs at least {4 * problem.k} entries a row for k = {problem.k}, got {problem.width}"


def topk(x: Array, k: int) -> tuple[Array, Array]:
    """[B, N] -> values and indices [B, k]; see ``refuses`` for the shapes it takes."""
    rows, width = x.shape
    size, room = group_size(width, k), slots(k)
    # The padding is the smallest value there is, a NaN with the sign bit set, and comes last: it never precedes an entry.
    lowest = keys.unsortable(jnp.zeros((), keys.UNSIGNED[x.dtype.itemsize]), x.dtype)
    # without the barriers XLA's CPU compiler takes the maxima and gathers the entries again in every pass over them
    if width % size:
        x = jax.lax.optimization_barrier(jnp.concatenate([x, jnp.full((rows, -width % size), lowest)], axis=1))
    groups = x.reshape(rows, x.shape[1] // size, size)
    maxima = jax.lax.optimization_barrier(keys.sortable(groups).max(axis=2))
    chosen, filled, low = _largest(maxima, k, room, _start(maxima, k))
    entries = keys.sortable(jnp.take_along_axis(groups, chosen[:, :, None], axis=1))
    entries = jnp.where(filled[:, :, None], entries, jnp.zeros((), entries.dtype)).reshape(rows, room * size)
    entries = jax.lax.optimization_barrier(entries)
    places, filled, _ = _largest(entries, k, room, low)
    key = jnp.where(filled, jnp.take_along_axis(entries, places, axis=1), jnp.zeros((), entries.dtype))
    values, order = reference.topk(keys.unsortable(key, x.dtype), k)
    places = jnp.take_along_axis(places, order, axis=1)
    return values, jnp.take_along_axis(chosen, places // size, axis=1) * size + places % size


def _start(maxima: Array, k: int) -> Array:
    """A key that k or more maxima of each row reach, and not many more: from the maxima of 4 k groups of them, which are soon searched."""
    factor = maxima.shape[1] // (4 * k)
    if factor < 2:
        return maxima.min(axis=1)
    maxima = jnp.pad(maxima, ((0, 0), (0, -maxima.shape[1] % factor)))
    maxima = jax.lax.optimization_barrier(maxima.reshape(maxima.shape[0], maxima.shape[1] // factor, factor).max(axis=2))
    return _narrow(maxima, k, k + k // 8, maxima.min(axis=1)).low


def _narrow(key: Array, k: int, fits: int, low: Array) -> Bracket:
    def count(bound):
        return marks.count(key >= bound[:, None])

    rank = jnp.full(key.shape[0], k, jnp.int32)
    n_low = count(low)
    bracket = Bracket(low, key.max(axis=1), n_low, n_low - n_low)  # a zero that varies over the same mesh axes, as a loop needs it
    # the next key first: in rows that are mostly zero, or -inf where latents are masked, the lowest value is often that of rank k
    return enclose(count, rank, bracket, fits, probes=(low + 1,))


def _largest(key: Array, k: int, room: int, low: Array) -> tuple[Array, Array, Array]:
    """Places [B, room] of the ``k`` largest keys of each row and perhaps some more, ascending; which of them are meant; a lower bound."""
    low, high, _, n_high = _narrow(key, k, room, low)
    above = marks.pack(key > high[:, None])
    level = marks.pack((key >= low[:, None]) & (key <= high[:, None]))
    words = above | marks.first(level, room - n_high)
    return marks.places(words, room), jnp.arange(room, dtype=jnp.int32) < marks.total(words)[:, None], low
