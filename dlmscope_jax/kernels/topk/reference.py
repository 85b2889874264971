"""The reference: ``jax.lax.top_k`` itself, whose order is the contract.

XLA's CPU call knows float32 only and half precision there is a full sort, 25 to 100 times slower, so that halves are widened on a CPU.
On GPUs it is a full sort of the row beyond k = 16.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


def topk(x: Array, k: int) -> tuple[Array, Array]:
    """[B, N] -> values and indices [B, k]."""
    if x.dtype.itemsize != 2:
        return _plain(x, k)
    return jax.lax.platform_dependent(x, cpu=partial(_widened, k=k), default=partial(_plain, k=k))


def _plain(x: Array, k: int) -> tuple[Array, Array]:
    values, indices = jax.lax.top_k(x, k)
    return values, indices


def _widened(x: Array, k: int) -> tuple[Array, Array]:
    values, indices = jax.lax.top_k(x.astype(jnp.float32), k)
    return values.astype(x.dtype), indices
