"""Products of row-sparse codes with a dictionary, with gradients that stay sparse.

A code is values and indices [B, k] over N latents; a dictionary stores one latent a row. Three primitives suffice for
decoding, for encoding and for both gradients, and each exists twice:

- ``combine``: out[b] = sum_j values[b, j] * weight[indices[b, j]]
- ``dots``:    out[b, j] = <rows[b], weight[indices[b, j]]>
- ``outer``:   out[n] = sum over (b, j) with indices[b, j] = n of values[b, j] * rows[b]

``gather`` touches the chosen rows only, one j at a time, so that no [B, k, D] array exists; ``reference`` scatters the code
into [B, N] and multiplies matrices. Which is faster depends on N / k against the device's ratio of FLOPs to bytes
(a dense product does N / k times the arithmetic of a sparse one, and reads memory far better).

Record behind the defaults (medians, float32, jax 0.10.2, 2-core CPU, B = 2048, k = 32):

| primitive | N = 2048, D = 192: gather / reference | N = 4096, D = 192 |
|-----------|-----------------------------------|-------------------|
| combine   | 1.0 / 9.2 ms                      | 1.5 / 28 ms       |
| dots      | 2.9 / 9.3 ms                      | 5.8 / 50 ms       |
| outer     | 3.0 / 15 ms                       | 3.8 / 74 ms       |

A whole training step (encoder, selection, decoder, both gradients, Adam; no AuxK) took 50 ms at N = 2048 and 83 ms at
N = 4096 with ``gather`` (medians, D = 192); in CPU time of the trainer's own step, on a busy machine, 87 against 185 ms
with ``reference`` at N = 2048 and 172 against 341 ms at N = 4096.

The ratio falls with N / k and crosses near 20: ``gather`` on CPU from N / k = 16. On accelerators nothing has been
measured; the roofline puts the crossing at N / k of 150 to 600 (nominal balance of A100 to TPU v6e), and 256 is taken.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlmscope_jax.errors import UserError

from . import gather, reference

IMPLEMENTATIONS = {"gather": gather, "reference": reference}
_GATHER_FROM_RATIO = {"cpu": 16}
_GATHER_FROM_RATIO_ELSEWHERE = 256


def default_implementation(width: int, k: int, platform: str) -> str:
    """The implementation taken when none is named, for ``k`` of ``width`` latents on ``platform``."""
    return "gather" if width >= k * _GATHER_FROM_RATIO.get(platform, _GATHER_FROM_RATIO_ELSEWHERE) else "reference"


def _named(implementation: str | None, width: int, k: int) -> str:
    name = implementation or default_implementation(width, k, jax.default_backend())
    if name not in IMPLEMENTATIONS:
        raise UserError(f"sparse product: implementation {name!r} is not known: one of {', '.join(IMPLEMENTATIONS)}")
    return name


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _decode(values: Array, indices: Array, weight: Array, name: str) -> Array:
    return IMPLEMENTATIONS[name].combine(values, indices, weight)


def _decode_forward(values, indices, weight, name):
    return _decode(values, indices, weight, name), (values, indices, weight)


def _decode_backward(name, saved, cotangent):
    values, indices, weight = saved
    ops = IMPLEMENTATIONS[name]
    return ops.dots(cotangent, indices, weight), None, ops.outer(values, indices, cotangent, weight.shape[0])


_decode.defvjp(_decode_forward, _decode_backward)


def decode(
    values: Float[Array, "B k"], indices: Int[Array, "B k"], weight: Float[Array, "N D"], implementation: str | None = None
) -> Float[Array, "B D"]:
    """``sum_j values[b, j] * weight[indices[b, j]]``, differentiable (reverse mode) in ``values`` and ``weight``.

    Args:
      values, indices: the code; an index may occur twice in a row, its values then add.
      weight: one latent a row.
      implementation: ``"gather"`` or ``"reference"``; None picks by platform and N / k.

    Raises:
      UserError: an implementation that is unknown.
    """
    return _decode(values, indices, weight, _named(implementation, weight.shape[0], indices.shape[-1]))


def preactivations(
    x: Float[Array, "B D"], weight: Float[Array, "N D"], bias: Float[Array, " N"], shift: Float[Array, " D"] | None = None
) -> Float[Array, "B N"]:
    """``(x - shift) @ weight.T + bias`` at the highest precision, because a selection is made from it."""
    shifted = x if shift is None else x - shift
    return jax.lax.dot_general(shifted, weight, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST) + bias


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attach(values, indices, x, weight, bias, shift, name):
    return values


def _attach_forward(values, indices, x, weight, bias, shift, name):
    return values, (indices, x, weight, bias, shift)


def _attach_backward(name, saved, cotangent):
    indices, x, weight, bias, shift = saved
    ops = IMPLEMENTATIONS[name]
    d_bias = jnp.zeros_like(bias).at[indices.reshape(-1)].add(cotangent.reshape(-1))
    d_weight = ops.outer(cotangent, indices, x if shift is None else x - shift, weight.shape[0])
    # The shift is shared by the batch, so its gradient needs the batch sum of the cotangents only: N * D work, not B * N * D.
    d_shift = None if shift is None else -jnp.matmul(d_bias, weight, precision=jax.lax.Precision.HIGHEST)
    return jnp.zeros_like(cotangent), None, ops.combine(cotangent, indices, weight), d_weight, d_bias, d_shift


_attach.defvjp(_attach_forward, _attach_backward)


def with_encoder_gradient(
    values: Float[Array, "B k"],
    indices: Int[Array, "B k"],
    x: Float[Array, "B D"],
    weight: Float[Array, "N D"],
    bias: Float[Array, " N"],
    shift: Float[Array, " D"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B k"]:
    """``values`` unchanged, with the gradient of ``preactivations(x, weight, bias, shift)`` at ``indices``.

    The dense pre-activations that a selection was made from are computed without gradient; this puts the gradient back
    for the selected entries alone, so that no [B, N] cotangent arises.

    Args:
      values: the pre-activations at ``indices``, already computed.
      indices: distinct within a row.
      implementation: as for ``decode``.
    """
    return _attach(values, indices, x, weight, bias, shift, _named(implementation, weight.shape[0], indices.shape[-1]))
