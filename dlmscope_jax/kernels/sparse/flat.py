"""Products of flat-sparse codes (BatchTopK, Matryoshka): M pairs (row, latent) of a batch, in any order, in chunks of rows.

A chunk at a time keeps the temporary at [chunk, D], as ``gather`` does for row-sparse codes.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_HIGHEST = jax.lax.Precision.HIGHEST
_CHUNK = 2048


def _chunks(*arrays: Array) -> tuple[int, list[Array]]:
    """[M] arrays as [n, chunk], padded with zeros (value 0 at row 0 and latent 0 adds nothing)."""
    size = min(_CHUNK, arrays[0].shape[0])
    n = -(-arrays[0].shape[0] // size)
    return n, [jnp.pad(a, (0, n * size - a.shape[0])).reshape(n, size) for a in arrays]


def combine(values: Array, rows: Array, latents: Array, weight: Array, n_rows: int) -> Array:
    """``out[rows[m]] += values[m] * weight[latents[m]]``: [M], [M], [M], [N, D] -> [n_rows, D]."""
    n, (v, r, i) = _chunks(values, rows, latents)

    def add(j, out):
        return out.at[r[j]].add(v[j][:, None] * weight[i[j]])

    return jax.lax.fori_loop(0, n, add, jnp.zeros((n_rows, weight.shape[1]), jnp.result_type(values, weight)))


def dots(left: Array, rows: Array, latents: Array, weight: Array) -> Array:
    """``left[rows[m]] . weight[latents[m]]``: [B, D], [M], [M], [N, D] -> [M]."""
    n, (r, i) = _chunks(rows, latents)
    return jax.lax.map(lambda pair: (left[pair[0]] * weight[pair[1]]).sum(axis=1), (r, i)).reshape(-1)[: rows.shape[0]]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _decode(values: Array, rows: Array, latents: Array, weight: Array, n_rows: int) -> Array:
    return combine(values, rows, latents, weight, n_rows)


def _decode_forward(values, rows, latents, weight, n_rows):
    return _decode(values, rows, latents, weight, n_rows), (values, rows, latents, weight)


def _decode_backward(n_rows, saved, cotangent):
    values, rows, latents, weight = saved
    return dots(cotangent, rows, latents, weight), None, None, combine(values, latents, rows, cotangent, weight.shape[0])


_decode.defvjp(_decode_forward, _decode_backward)


def decode_flat(
    values: Float[Array, " M"], rows: Int[Array, " M"], latents: Int[Array, " M"], weight: Float[Array, "N D"], n_rows: int
) -> Float[Array, "B D"]:
    """``out[b] = sum over m with rows[m] = b of values[m] * weight[latents[m]]``, differentiable (reverse) in values and weight."""
    return _decode(values, rows, latents, weight, n_rows)


@jax.custom_vjp
def _attach(values, rows, latents, x, weight, bias, shift):
    return values


def _attach_forward(values, rows, latents, x, weight, bias, shift):
    return values, (rows, latents, x, weight, bias, shift)


def _attach_backward(saved, cotangent):
    rows, latents, x, weight, bias, shift = saved
    d_bias = jnp.zeros_like(bias).at[latents].add(cotangent)
    d_weight = combine(cotangent, latents, rows, x if shift is None else x - shift, weight.shape[0])
    d_shift = None if shift is None else -jnp.matmul(d_bias, weight, precision=_HIGHEST)
    return jnp.zeros_like(cotangent), None, None, combine(cotangent, rows, latents, weight, x.shape[0]), d_weight, d_bias, d_shift


_attach.defvjp(_attach_forward, _attach_backward)


def with_flat_encoder_gradient(
    values: Float[Array, " M"],
    rows: Int[Array, " M"],
    latents: Int[Array, " M"],
    x: Float[Array, "B D"],
    weight: Float[Array, "N D"],
    bias: Float[Array, " N"],
    shift: Float[Array, " D"] | None = None,
) -> Float[Array, " M"]:
    """As ``with_encoder_gradient``, for the pre-activations of the pairs (rows[m], latents[m])."""
    return _attach(values, rows, latents, x, weight, bias, shift)
