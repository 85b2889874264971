"""Pre-activations of all latents, the one dense product that a training step cannot do without.

Traffic: x and weight read, [B, N] written. Range: every shape and dtype; the product is taken in float32 at the highest precision,
because a selection is made from it. The shift is shared by the batch, so its gradient is made of the batch sum of the cotangents,
N D work; autodiff would multiply all B rows, B N D work, and sum afterwards. Reverse mode only.
"""

import jax
from jaxtyping import Array, Float

from .sparse_matmul.reference import accumulator, matmul


def _shifted(x: Array, shift: Array | None, dtype) -> Array:
    """The difference of both as they are in ``dtype``: one in half precision would be rounded."""
    return x.astype(dtype) if shift is None else x.astype(dtype) - shift.astype(dtype)


@jax.custom_vjp
def _preactivations(x: Array, weight: Array, bias: Array, shift: Array | None) -> Array:
    dtype = accumulator(x, weight)
    product = jax.lax.dot_general(
        _shifted(x, shift, dtype), weight.astype(dtype), (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )
    return product + bias.astype(dtype)


def _forward(x, weight, bias, shift):
    return _preactivations(x, weight, bias, shift), (x, weight, bias, shift)


def _backward(saved, cotangent):
    x, weight, bias, shift = saved
    d_bias = cotangent.sum(axis=0)
    d_weight = matmul(cotangent.T, _shifted(x, shift, cotangent.dtype)).astype(weight.dtype)
    d_shift = None if shift is None else -matmul(d_bias, weight).astype(shift.dtype)
    return matmul(cotangent, weight).astype(x.dtype), d_weight, d_bias.astype(bias.dtype), d_shift


_preactivations.defvjp(_forward, _backward)


def preactivations(
    x: Float[Array, "B D"], weight: Float[Array, "N D"], bias: Float[Array, " N"], shift: Float[Array, " D"] | None = None
) -> Float[Array, "B N"]:
    """``(x - shift) @ weight.T + bias``, float32 at the highest precision."""
    return _preactivations(x, weight, bias, shift)
