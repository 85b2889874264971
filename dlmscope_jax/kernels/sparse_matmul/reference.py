"""Row-sparse products by way of a dense [B, N] code and a matrix product."""

import jax
import jax.numpy as jnp
from jax import Array

_HIGHEST = jax.lax.Precision.HIGHEST


def scatter(values: Array, indices: Array, width: int) -> Array:
    """[B, k], [B, k] -> [B, N]; values of an index that occurs twice in a row add."""
    rows = jnp.arange(values.shape[0])[:, None]
    return jnp.zeros((values.shape[0], width), values.dtype).at[rows, indices].add(values)


def combine(values: Array, indices: Array, weight: Array) -> Array:
    """[B, k], [B, k], [N, D] -> [B, D]."""
    return jnp.matmul(scatter(values, indices, weight.shape[0]), weight, precision=_HIGHEST)


def dots(rows: Array, indices: Array, weight: Array) -> Array:
    """[B, D], [B, k], [N, D] -> [B, k]."""
    return jnp.take_along_axis(jnp.matmul(rows, weight.T, precision=_HIGHEST), indices, axis=1)


def outer(values: Array, indices: Array, rows: Array, width: int) -> Array:
    """[B, k], [B, k], [B, D] -> [N, D]."""
    return jnp.matmul(scatter(values, indices, width).T, rows, precision=_HIGHEST)
