"""Exact top-k in two levels: maxima of groups first, then the entries of the k best groups.

Rows are cut into consecutive groups of g. An entry among the k largest lies in a group whose maximum is among the k
largest maxima (of equal entries the lower index wins, and so does the lower group), so only k * g candidates remain.
Sorting the chosen group ids before gathering keeps candidates in index order, which is why ties come out as in
``lax.top_k``. Work: one pass over N, then selections over N / g and k * g entries, least at g = sqrt(N / k).

Maxima are taken over order-preserving integer keys: a floating maximum may return either of 0.0 and -0.0 and does not
order NaN by sign, either of which would break the exact order in rare rows.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

_BITS = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}


def group_size(width: int, k: int) -> int:
    """The power of two next to sqrt(N / k), at least 1."""
    return 2 ** max(0, round(math.log2(max(1.0, math.sqrt(width / k)))))


def supports(width: int, k: int) -> bool:
    """Whether two levels leave at most half of the entries as candidates, which holds from N = 4 k on."""
    size = group_size(width, k)
    return size >= 2 and 2 * k * size <= width


def _key(x: Array) -> Array:
    """Signed integers in the total order of the floats (an involution on the bits)."""
    bits = jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize])
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)


def _unkey(key: Array, dtype) -> Array:
    return jax.lax.bitcast_convert_type(jnp.where(key < 0, key ^ jnp.iinfo(key.dtype).max, key), dtype)


def topk(x: Array, k: int) -> tuple[Array, Array]:
    """[B, N] -> values and indices [B, k]; see ``supports`` for the shapes it takes."""
    rows, width = x.shape
    size = group_size(width, k)
    groups = -(-width // size)
    # The padding is the smallest value there is, a NaN with the sign bit set, so that it never precedes an entry.
    key = jnp.pad(_key(x), ((0, 0), (0, groups * size - width)), constant_values=jnp.iinfo(_BITS[x.dtype.itemsize]).min)
    key = key.reshape(rows, groups, size)
    _, chosen = jax.lax.top_k(_unkey(key.max(axis=2), x.dtype), k)
    chosen = jnp.sort(chosen, axis=1)
    candidates = _unkey(jnp.take_along_axis(key, chosen[:, :, None], axis=1).reshape(rows, k * size), x.dtype)
    values, place = jax.lax.top_k(candidates, k)
    indices = jnp.take_along_axis(chosen, place // size, axis=1) * size + place % size
    return values, indices
