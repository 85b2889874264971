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

Over devices (``axes``) the codes move, and they are bits: 8 rows a byte. The parts of the batch are gathered for the latents that a
device holds; then these go once round the ring of the devices that hold other latents, and each device meets its own with all. It gives
n_l B_l / 8 bytes to the gather and n_l B / 8 to each of M - 1 steps of the ring (n_l, B_l its latents and rows, B all rows, M parts of
the latents). The sums are those of counts still, so every covariance and its sign are exactly those of one device. Each pair is met
twice, by the devices of both its latents, and by each part of the rows again: signs, which would move in place of that, are N^2.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

from .axes import ALONE, Axes

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


def _packed(codes: Array) -> UInt8[Array, "N bytes"]:
    """[n, N] of 0 and 1 -> 8 rows a byte; zeros fill the last."""
    on = (codes.T != 0).astype(jnp.uint8)
    on = jnp.pad(on, ((0, 0), (0, -on.shape[1] % 8))).reshape(on.shape[0], -1, 8)
    return (on << jnp.arange(8, dtype=jnp.uint8)).sum(axis=2, dtype=jnp.uint8)


def _unpacked(packed: UInt8[Array, "N bytes"]) -> Bool[Array, "N n"]:
    return (((packed[:, :, None] >> jnp.arange(8, dtype=jnp.uint8)) & jnp.uint8(1)) != 0).reshape(packed.shape[0], -1)


def _divided_pass(codes: Array, block: int, axes: Axes, gradient: bool) -> tuple[Array, Array | None]:
    """Q, the same everywhere, and, if wanted, dQ/dX of the rows and latents that are here."""
    n_here, width = codes.shape
    n, dtype, cut = n_here * axes.row_parts, _factor_dtype(), jax.lax.dynamic_slice_in_dim
    count = -(-width // block)
    block = -(-width // count)
    packed = _packed(codes)
    part = 8 * packed.shape[1]  # rows of a part, filling included
    first_row = jax.lax.axis_index(axes.rows) * part if axes.rows else 0
    packed = jax.lax.all_gather(packed, axes.rows, axis=1, tiled=True) if axes.rows else packed
    mine = _unpacked(packed).astype(dtype)
    mine_ones = mine.astype(jnp.float32).sum(axis=1)[:, None]
    latent = jnp.arange(width, dtype=jnp.int32)[:, None]

    def meet(others: Array, same: Array | bool, state: tuple) -> tuple:
        """``state`` with all pairs of a latent here and one of ``others``; ``same`` latents are no pair with themselves."""
        others = jnp.pad(others, ((0, count * block - width), (0, 0)))  # constant latents covary with nothing

        def strip(i: Array, state: tuple) -> tuple:
            total, out, mean = state
            bits = _unpacked(cut(others, i * block, block)).astype(dtype)
            ones = bits.astype(jnp.float32).sum(axis=1)[None]
            itself = same & (latent == i * block + jnp.arange(block, dtype=jnp.int32)[None])
            covariance = jnp.where(itself, 0.0, n * _dot(mine, bits, (1, 1)) - mine_ones * ones)
            total = total + jnp.abs(covariance).sum()
            if gradient:
                sign = jnp.sign(covariance)
                out = out + _dot(sign.astype(dtype), cut(bits, first_row, n_here, axis=1), (1, 0))
                mean = mean + (sign * (ones / n)).sum(axis=1)
            return total, out, mean

        return jax.lax.fori_loop(0, count, strip, state)

    shapes = ((width, n_here), (width,)) if gradient else ((), ())
    state = jnp.float32(0), *(jnp.zeros(shape, jnp.float32) for shape in shapes)
    if axes.latents is None or axes.latent_parts == 1:
        total, out, mean = meet(packed, True, state)
    else:
        ring = [(i, (i + 1) % axes.latent_parts) for i in range(axes.latent_parts)]
        latents = axes.latents

        def onward(step: Array, carried: tuple) -> tuple:
            others, state = carried
            # the next ones are on their way while these are met
            return jax.lax.ppermute(others, latents, ring), meet(others, step == 0, state)

        others, state = jax.lax.fori_loop(0, axes.latent_parts - 1, onward, (packed, state))
        total, out, mean = meet(others, False, state)
    pairs = n * max(n - 1, 1)
    total = total if axes.latents is None else jax.lax.psum(total, axes.latents)
    return total / pairs, (out - mean[:, None]).T * (2.0 / max(n - 1, 1)) if gradient else None


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _offdiagonal(codes: Array, block: int, axes: Axes) -> Array:
    return _pass(codes, block, gradient=False)[0] if axes.alone else _divided_pass(codes, block, axes, gradient=False)[0]


def _forward(codes, block, axes):
    return _pass(codes, block, gradient=True) if axes.alone else _divided_pass(codes, block, axes, gradient=True)


def _backward(block, axes, gradient, cotangent):
    return ((cotangent * gradient).astype(gradient.dtype),)


_offdiagonal.defvjp(_forward, _backward)


def offdiagonal_covariance(codes: Float[Array, "n N"], block: int = _BLOCK, axes: Axes = ALONE) -> Float[Array, ""]:
    """The sum over j != k of ``|C_jk|``, C the unbiased covariance of the columns over the rows; each pair is counted twice.

    Reverse mode only. Memory beside the codes: a few arrays of [block, N / 2] and, with gradient, of [1.5 N, n]; where ``axes`` divide
    them, the codes of all rows and this device's latents, and a few arrays of [block, n_l].

    Args:
      codes: float32, every entry 0 or 1 (not checked); one row gives 0.
      block: latents in a strip.
      axes: what divides rows and latents; the result is that of all of them, the gradient that of the codes that are here.
    """
    return _offdiagonal(codes, block, axes)
