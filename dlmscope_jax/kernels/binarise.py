"""The step of a binary autoencoder: exact forward, a gradient that is made up, because the true one is zero.

All estimators see the *sum* of the cotangents that reach the code (reconstruction, entropy, covariance), once.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dlmscope_jax.errors import UserError

ESTIMATORS = ("identity", "sigmoid", "rectangle", "g_times_1mg", "x_times_1mx")


def estimate(cotangent: Array, pre: Array, estimator: str, temperature: float) -> Array:
    """What passes back through the step: the table of ``binarise``."""
    if estimator == "sigmoid":
        return cotangent * jax.nn.sigmoid(pre / temperature) * jax.nn.sigmoid(-pre / temperature)
    if estimator == "rectangle":
        return jnp.where(jnp.abs(pre) < temperature / 2, cotangent / temperature, 0.0)
    if estimator == "g_times_1mg":
        return cotangent * (1.0 - cotangent)
    return cotangent * pre * (1.0 - pre) if estimator == "x_times_1mx" else cotangent


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _binarise(pre, estimator, temperature, at_zero, bits):
    on = pre >= 0 if at_zero else pre > 0
    support = on.astype(pre.dtype)
    if bits == 1:
        return support, support
    top = 2**bits - 1
    return support, jnp.where(on, jnp.clip(jnp.ceil(pre * top), 1, top) / top, 0.0)


def _forward(pre, estimator, temperature, at_zero, bits):
    return _binarise(pre, estimator, temperature, at_zero, bits), pre


def _backward(estimator, temperature, at_zero, bits, pre, cotangents):
    return (estimate(cotangents[0] + cotangents[1], pre, estimator, temperature),)


_binarise.defvjp(_forward, _backward)


def binarise(
    pre: Float[Array, "B N"], estimator: str = "identity", temperature: float = 1.0, at_zero: bool = False, bits: int = 1
) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
    """``(1[pre > 0], value to decode)``, with the gradient of the named estimator; g is the sum of both cotangents, T the temperature.

    | estimator       | passed back                    | where it is from                                                       |
    |-----------------|--------------------------------|------------------------------------------------------------------------|
    | ``identity``    | g                              | what the released code comes to, because its g is about 1e-6           |
    | ``sigmoid``     | g s(x/T) s(-x/T)               | what the paper means (T = 1); sparsify's binary coder (T = 2, no 1/T)  |
    | ``rectangle``   | g/T where abs(x) < T/2, else 0 | the kernel of JumpReLU; T is its full width                            |
    | ``g_times_1mg`` | g (1 - g)                      | the released code, letter by letter: it never sees x                   |
    | ``x_times_1mx`` | g x (1 - x)                    | the paper, letter by letter (its equation 6); negative outside of 0..1 |

    The value is the bit itself, or with ``bits`` = q > 1 (our reading of the paper's unpublished "more-bit decoding") one of
    the 2^q - 1 levels c / (2^q - 1), c = clip(ceil(x (2^q - 1)), 1, 2^q - 1), where the bit is 1, and 0 where it is 0: the support is that
    of the 1-bit code, and q = 1 gives the 1-bit code.

    Args:
      pre: pre-activations x.
      temperature: T, above 0.
      at_zero: whether exactly 0 gives 1 (the paper's text) and not 0 (the released code).
      bits: q, at least 1.

    Raises:
      UserError: an estimator that is unknown.
    """
    if estimator not in ESTIMATORS:
        raise UserError(f"binarise: estimator {estimator!r} is not known: one of {', '.join(ESTIMATORS)}")
    return _binarise(pre, estimator, temperature, at_zero, bits)
