"""The summed off-diagonal covariance of 0/1 codes, in strips of latents, without an [N, N] array.

    Q = sum_{j != k} |C_jk|,   C = X_c^T X_c / (n - 1),   dQ/dX = 2 / (n - 1) X_c sign(C),   sign(0) = 0, the diagonal left out

X_c are the codes less their means. Three things make it cheaper than the formula: C is symmetric, and each pair of latents
is met once; its sign is all that the gradient needs of it, so value and gradient come from one pass and only [n, N] is kept; and
n (n - 1) C = n X^T X - s s^T, s the column sums, is made of counts, which float32 holds exactly up to n = 4,096 rows (and bf16
factors do no harm to), so that covariances which are zero have sign zero.

The latents lie on a ring of an odd number m of blocks; block i is met with itself and with the (m - 1) / 2 blocks that follow
it, one slice of the ring: that is every pair of blocks once.

Record (``scripts/bench_covariance.py``, value and gradient, n = 512, jax 0.10.2, a busy 2-core CPU; processor time, in strips / dense
formula under autodiff): N = 4,096 0.33 / 0.85 s, 29 / 264 MiB of temporaries; N = 8,192 1.33 / 3.35 s, 57 / 1,040 MiB. Strips of 256 to
1,024 take the same time within a tenth. Not measured on accelerators.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_BLOCK = 512


def _dot(left: Array, right: Array, axes: tuple[int, int]) -> Array:
    return jax.lax.dot_general(left, right, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)


def _factor_dtype() -> jnp.dtype:
    """What 0, 1 and -1 are multiplied in: exact everywhere, and fast where there are units for it."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def _pass(codes: Array, block: int, gradient: bool) -> tuple[Array, Array | None]:
    """Q and, if wanted, dQ/dX [n, N]."""
    n, width = codes.shape
    count = -(-width // block) | 1  # odd
    block = -(-width // count)
    half = (count - 1) // 2 * block
    dtype = _factor_dtype()
    ring = jnp.pad(codes.T.astype(dtype), ((0, count * block - width), (0, 0)))  # constant latents covary with nothing
    ring = jnp.concatenate([ring, ring[:half]])
    ones = ring.astype(jnp.float32).sum(axis=1)
    itself = jnp.eye(block, dtype=bool)
    cut = jax.lax.dynamic_slice_in_dim

    def strip(i, state):
        total, out = state
        here, after = i * block, (i + 1) * block
        mine, others = cut(ring, here, block), cut(ring, after, half)
        mine_ones, others_ones = cut(ones, here, block)[:, None], cut(ones, after, half)
        inner = jnp.where(itself, 0.0, n * _dot(mine, mine, (1, 1)) - mine_ones * mine_ones.T)
        outer = n * _dot(mine, others, (1, 1)) - mine_ones * others_ones
        total = total + jnp.abs(inner).sum() + 2.0 * jnp.abs(outer).sum()
        if gradient:
            inner, outer = jnp.sign(inner).astype(dtype), jnp.sign(outer).astype(dtype)
            update = jax.lax.dynamic_update_slice_in_dim
            out = update(out, cut(out, here, block) + _dot(inner, mine, (1, 0)) + _dot(outer, others, (1, 0)), here, 0)
            out = update(out, cut(out, after, half) + _dot(outer, mine, (0, 0)), after, 0)
        return total, out

    pairs = n * max(n - 1, 1)
    total, out = jax.lax.fori_loop(0, count, strip, (jnp.float32(0), jnp.zeros(ring.shape if gradient else (), jnp.float32)))
    if not gradient:
        return total / pairs, None
    out = out[: count * block].at[:half].add(out[count * block :])[:width].T
    return total / pairs, (out - out.mean(axis=0)) * (2.0 / max(n - 1, 1))  # sign @ X less sign @ mean


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _offdiagonal(codes: Array, block: int) -> Array:
    return _pass(codes, block, gradient=False)[0]


def _forward(codes, block):
    return _pass(codes, block, gradient=True)


def _backward(block, gradient, cotangent):
    return ((cotangent * gradient).astype(gradient.dtype),)


_offdiagonal.defvjp(_forward, _backward)


def offdiagonal_covariance(codes: Float[Array, "n N"], block: int = _BLOCK) -> Float[Array, ""]:
    """The sum over j != k of ``|C_jk|``, C the unbiased covariance of the columns over the rows; each pair is counted twice.

    Reverse mode only. Memory beside the codes: a few arrays of [block, N / 2] and, with gradient, of [1.5 N, n].

    Args:
      codes: float32, every entry 0 or 1 (not checked); one row gives 0.
      block: latents in a strip.
    """
    return _offdiagonal(codes, block)
