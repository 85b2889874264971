"""Sparse products as XLA loops that touch the chosen rows only: of row-sparse codes a few columns at a time, of flat ones chunks.

    combine: out[b] = sum_j values[b, j] weight[indices[b, j]]        dots: out[b, j] = <rows[b], weight[indices[b, j]]>
    outer: out[n] = sum over (b, j) with indices[b, j] = n of values[b, j] rows[b]

Memory traffic: k rows of [D] read for each of the B rows. ``combine`` adds eight columns of the code in one elementwise loop, so that its
result [B, D] is read and written k / 8 times. ``dots`` holds [B, D], on a CPU a few rows' k gathered rows; flat forms hold [2048, D].
``outer`` reads and writes k B rows of [N, D]. Range: every shape and dtype; sums are float32. Sums are taken in a fixed order but for
``outer`` and ``combine_flat``, which scatter: on a CPU in a fixed order too, on accelerators in none, so there ``segments`` takes
their place. Measurements: README.md.
"""

import jax
import jax.numpy as jnp
from jax import Array

from .reference import accumulator, zeros

_CHUNK = 2048  # pairs of a flat code that are gathered at once
_GATHERED = 2**19  # elements of the dictionary that ``dots`` gathers at once on a CPU
_UNROLL = 8  # columns that ``combine`` adds before it writes the sum


def combine(values: Array, indices: Array, weight: Array) -> Array:
    """[B, k], [B, k], [N, D] -> [B, D]."""
    dtype = accumulator(values, weight)
    values, k = values.astype(dtype), values.shape[1]

    def add(j, total):
        return total + values[:, j, None] * weight[indices[:, j]].astype(dtype)

    def several(step, total):
        for j in range(_UNROLL):
            total = add(k % _UNROLL + step * _UNROLL + j, total)
        return total

    total = zeros((values.shape[0], weight.shape[1]), dtype, values, indices, weight)
    for j in range(k % _UNROLL):
        total = add(j, total)
    return jax.lax.fori_loop(0, k // _UNROLL, several, total)


def dots(rows: Array, indices: Array, weight: Array) -> Array:
    """[B, D], [B, k], [N, D] -> [B, k]."""
    return jax.lax.platform_dependent(rows, indices, weight, cpu=_dots_by_rows, default=_dots_by_columns)


def _dots_by_columns(rows: Array, indices: Array, weight: Array) -> Array:
    dtype = accumulator(rows, weight)
    rows = rows.astype(dtype)
    return jax.lax.map(lambda chosen: (rows * weight[chosen].astype(dtype)).sum(axis=1), indices.T).T


def _dots_by_rows(rows: Array, indices: Array, weight: Array) -> Array:
    """A few rows of the batch a step, each a product of a matrix [k, D] with a vector: a CPU has kernels for that, which sums are not."""
    dtype = accumulator(rows, weight)
    (b, k), d = indices.shape, weight.shape[1]
    size = min(b, max(1, _GATHERED // max(1, k * d)))
    steps = -(-b // size)

    def cut(a):
        return jnp.pad(a, ((0, steps * size - b), (0, 0))).reshape(steps, size, a.shape[1])

    def some(pair):
        some_rows, chosen = pair
        return jnp.einsum("bkd,bd->bk", weight[chosen].astype(dtype), some_rows.astype(dtype), precision=jax.lax.Precision.HIGHEST)

    return jax.lax.map(some, (cut(rows), cut(indices))).reshape(steps * size, k)[:b]


def outer(values: Array, indices: Array, rows: Array, width: int) -> Array:
    """[B, k], [B, k], [B, D] -> [N, D]."""
    dtype = accumulator(values, rows)
    values, rows = values.astype(dtype), rows.astype(dtype)

    def add(j, total):
        return total.at[indices[:, j]].add(values[:, j, None] * rows)

    return jax.lax.fori_loop(0, indices.shape[1], add, zeros((width, rows.shape[1]), dtype, values, indices, rows))


def combine_flat(values: Array, rows: Array, latents: Array, weight: Array, n_rows: int) -> Array:
    """[M], [M], [M], [N, D] -> [n_rows, D]."""
    dtype = accumulator(values, weight)
    v, r, i = _chunk(values, 0), _chunk(rows, n_rows), _chunk(latents, 0)  # what fills the last chunk goes to no row

    def add(j, out):
        return out.at[r[j]].add(v[j][:, None].astype(dtype) * weight[i[j]].astype(dtype), mode="drop")

    return jax.lax.fori_loop(0, len(v), add, zeros((n_rows, weight.shape[1]), dtype, values, rows, latents, weight))


def dots_flat(left: Array, rows: Array, latents: Array, weight: Array) -> Array:
    """[B, D], [M], [M], [N, D] -> [M]."""
    dtype = accumulator(left, weight)

    def chunk(pair):
        return row_sums(left[pair[0]].astype(dtype) * weight[pair[1]].astype(dtype))

    return jax.lax.map(chunk, (_chunk(rows, 0), _chunk(latents, 0))).reshape(-1)[: rows.shape[0]]


def sums_flat(values: Array, latents: Array, width: int) -> Array:
    """[M], [M] -> [N]: the sum of each latent's values."""
    dtype = accumulator(values)
    return jnp.zeros(width, dtype).at[latents].add(values.astype(dtype))


def row_sums(a: Array) -> Array:
    """[B, D] -> [B]. On a CPU a product with ones takes half the time of a sum, which XLA does not spread over vector lanes."""

    def product(a):
        return jnp.matmul(a, jnp.ones(a.shape[1], a.dtype), precision=jax.lax.Precision.HIGHEST)

    return jax.lax.platform_dependent(a, cpu=product, default=lambda a: a.sum(axis=1))


def _chunk(a: Array, fill: int) -> Array:
    """[M] -> [n, chunk]."""
    size = max(1, min(_CHUNK, a.shape[0]))
    n = -(-a.shape[0] // size)
    return jnp.pad(a, (0, n * size - a.shape[0]), constant_values=fill).reshape(n, size)
