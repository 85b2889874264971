"""The row-local update strip by strip, so that everything after the first read happens in the processor's cache.

Compiled as one expression, XLA on a CPU makes one pass over memory for the radial part, one for its removal, one for each moment,
one for the weight and one for its norm. Here a strip of rows is carried through all of them before the next one is touched.
A strip is done in blocks, first the moments of all of its blocks, then their weights: two loops and not one, because XLA would
compute the weight from the old moments once more and then copy whole arrays to keep those.

Memory traffic: weight, both moments and gradient read once, weight and both moments written once: 28 bytes an element in float32, 20
with bfloat16 moments. Nothing larger than a block is allocated; the loops update in place where the caller donates. Range: any shape and
any mix of float32 and bfloat16 moments, on a CPU; the weight moves by the moments as they are kept, rounded if they are bfloat16. The last
block of rows may overlap the one before it, whose rows it then leaves alone. Measurement: README.md.
"""

import jax
import jax.numpy as jnp
from jax import Array

from .reference import moments, moved, without_radial
from .rounding import stored

_BLOCK = 2**18  # elements: 1 MB of each array
_BLOCKS = 4  # in a strip


def block_rows(depth: int) -> int:
    """Rows of a block."""
    return max(1, _BLOCK // depth)


def strip_rows(depth: int) -> int:
    """Rows of a strip."""
    return _BLOCKS * block_rows(depth)


def row_update(
    weight: Array, mu: Array, nu: Array, gradient: Array, rate: Array, count: Array, scale: Array, keep: Array,
    *, b1: float, b2: float, eps: float, unit: bool,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """[N, D] four times and four scalars -> the weight and both moments."""
    width, depth = weight.shape
    rows = min(width, block_rows(depth))
    step = count.astype(jnp.float32)
    corrections = 1 - b1**step, 1 - b2**step

    def cut(a: Array, at: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(a, at, rows)

    def place(strip: Array, block: Array) -> tuple[Array, Array]:
        """Where a block begins, and [rows, 1] which of its rows are its own."""
        begin = (strip * _BLOCKS + block) * rows
        at = jnp.minimum(begin, width - rows)
        return at, keep & (at + jnp.arange(rows, dtype=jnp.int32) >= begin)[:, None]

    def put(a: Array, new: Array, at: Array, own: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(a, jnp.where(own, new, cut(a, at)), at, 0)

    def one_strip(strip: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weight, mu, nu = state

        def of_moments(block: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            mu, nu = state
            at, own = place(strip, block)
            g = cut(gradient, at)
            g = (without_radial(g, cut(weight, at)) if unit else g) * scale
            first, second = moments(cut(mu, at), cut(nu, at), g, b1, b2)
            first, second = stored(first, mu.dtype, count, at * depth), stored(second, nu.dtype, count, at * depth)
            return put(mu, first, at, own), put(nu, second, at, own)

        def of_weights(block: Array, weight: Array) -> Array:
            at, own = place(strip, block)
            first, second = cut(mu, at).astype(jnp.float32), cut(nu, at).astype(jnp.float32)
            return put(weight, moved(cut(weight, at), first, second, rate, corrections, eps, unit), at, own)

        mu, nu = jax.lax.fori_loop(0, _BLOCKS, of_moments, (mu, nu))
        return jax.lax.fori_loop(0, _BLOCKS, of_weights, weight), mu, nu

    return jax.lax.fori_loop(0, -(-width // (rows * _BLOCKS)), one_strip, (weight, mu, nu))
