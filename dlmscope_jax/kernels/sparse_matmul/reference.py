"""The reference of sparse products: the code written out as [B, N], and a matrix product at the highest precision.

Memory traffic: [B, N] written and read, the dictionary read once; N / k times the arithmetic of the sparse forms, at the speed of a
matrix product. Range: everything. A NaN or an infinity in one row of the dictionary reaches every row of the result, because 0 times it
is NaN; the other implementations leave it to the rows whose codes hold that latent.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array


def accumulator(*arrays: Array) -> jnp.dtype:
    """What products add in: float32 whatever the dtype of the factors, bf16 among them; float64 where one is float64."""
    return jnp.dtype(jnp.float64 if any(a.dtype == jnp.float64 for a in arrays) else jnp.float32)


def zeros(shape: tuple[int, ...], dtype: jnp.dtype, *like: Array) -> Array:
    """What a loop begins to add to; inside ``shard_map`` it varies over the mesh axes that one of ``like`` varies over."""
    scalars = [jnp.zeros_like(a, shape=(), dtype=dtype) for a in like]
    return jnp.zeros_like(functools.reduce(jnp.add, scalars), shape=shape)


def matmul(left: Array, right: Array) -> Array:
    """The matrix product of both as they are in the accumulator's dtype, at the highest precision."""
    dtype = accumulator(left, right)
    return jnp.matmul(left.astype(dtype), right.astype(dtype), precision=jax.lax.Precision.HIGHEST)


def scatter(values: Array, indices: Array, width: int) -> Array:
    """[B, k], [B, k] -> [B, N]; values of an index that occurs twice in a row add."""
    rows = jnp.arange(values.shape[0])[:, None]
    return jnp.zeros((values.shape[0], width), values.dtype).at[rows, indices].add(values)


def scatter_flat(values: Array, rows: Array, latents: Array, n_rows: int, width: int) -> Array:
    """[M], [M], [M] -> [n_rows, width]; values of a pair that occurs twice add."""
    return jnp.zeros((n_rows, width), values.dtype).at[rows, latents].add(values)


def combine(values: Array, indices: Array, weight: Array) -> Array:
    """[B, k], [B, k], [N, D] -> [B, D]."""
    return matmul(scatter(values, indices, weight.shape[0]), weight)


def dots(rows: Array, indices: Array, weight: Array) -> Array:
    """[B, D], [B, k], [N, D] -> [B, k]."""
    return jnp.take_along_axis(matmul(rows, weight.T), indices, axis=1)


def outer(values: Array, indices: Array, rows: Array, width: int) -> Array:
    """[B, k], [B, k], [B, D] -> [N, D]."""
    return matmul(scatter(values, indices, width).T, rows)


def combine_flat(values: Array, rows: Array, latents: Array, weight: Array, n_rows: int) -> Array:
    """[M], [M], [M], [N, D] -> [n_rows, D]."""
    return matmul(scatter_flat(values, rows, latents, n_rows, weight.shape[0]), weight)


def dots_flat(left: Array, rows: Array, latents: Array, weight: Array) -> Array:
    """[B, D], [M], [M], [N, D] -> [M]."""
    return matmul(left, weight.T)[rows, latents]
