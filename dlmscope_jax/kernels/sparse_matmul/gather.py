"""Sparse products as XLA loops that touch the chosen rows only: of row-sparse codes one of the k columns at a time, of flat ones chunks.

    combine: out[b] = sum_j values[b, j] weight[indices[b, j]]        dots: out[b, j] = <rows[b], weight[indices[b, j]]>
    outer: out[n] = sum over (b, j) with indices[b, j] = n of values[b, j] rows[b]

Memory traffic: k rows of [D] read for each of the B rows, and the temporary [B, D] (a chunk of flat pairs: [2048, D]) written and read
k times, which stays in cache where it fits; ``outer`` reads and writes k B rows of [N, D]. Range: every shape and dtype; sums are
float32. Sums are taken in a fixed order but for ``outer`` and ``combine_flat``, which scatter: on a CPU in a fixed order too, on
accelerators in none, so there ``segments`` takes their place. Measurements: README.md.
"""

import jax
import jax.numpy as jnp
from jax import Array

from .reference import accumulator, zeros

_CHUNK = 2048


def combine(values: Array, indices: Array, weight: Array) -> Array:
    """[B, k], [B, k], [N, D] -> [B, D]."""
    dtype = accumulator(values, weight)
    values = values.astype(dtype)

    def add(j, total):
        return total + values[:, j, None] * weight[indices[:, j]].astype(dtype)

    start = zeros((values.shape[0], weight.shape[1]), dtype, values, indices, weight)
    return jax.lax.fori_loop(0, values.shape[1], add, start)


def dots(rows: Array, indices: Array, weight: Array) -> Array:
    """[B, D], [B, k], [N, D] -> [B, k]."""
    dtype = accumulator(rows, weight)
    rows = rows.astype(dtype)

    def column(chosen):
        return row_sums(rows * weight[chosen].astype(dtype))

    return jax.lax.map(column, indices.T).T


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
