"""The row-local update in plain array operations; its equations are in the package's documentation."""

import jax
import jax.numpy as jnp
from jax import Array

from .rounding import stored

TINY = 1e-30


def without_radial(gradient: Array, weight: Array) -> Array:
    """Each row of the gradient without its part along the row of the weight."""
    square = jnp.maximum(jnp.square(weight).sum(axis=-1, keepdims=True), TINY)
    return gradient - (gradient * weight).sum(axis=-1, keepdims=True) / square * weight


def moments(mu: Array, nu: Array, gradient: Array, b1: float, b2: float) -> tuple[Array, Array]:
    """Both moments after a gradient, float32."""
    return b1 * mu.astype(jnp.float32) + (1 - b1) * gradient, b2 * nu.astype(jnp.float32) + (1 - b2) * jnp.square(gradient)


def moved(weight: Array, mu: Array, nu: Array, rate: Array, corrections: tuple[Array, Array], eps: float, unit: bool) -> Array:
    """The weight after its step; ``corrections`` are 1 - beta^t."""
    weight = weight - rate * (mu / corrections[0]) / (jnp.sqrt(nu / corrections[1]) + eps)
    if not unit:
        return weight
    return weight * jax.lax.rsqrt(jnp.maximum(jnp.square(weight).sum(axis=-1, keepdims=True), TINY))


def row_update(
    weight: Array, mu: Array, nu: Array, gradient: Array, rate: Array, count: Array, scale: Array, keep: Array,
    *, b1: float, b2: float, eps: float, unit: bool,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """[N, D] four times and four scalars -> the weight and both moments."""
    step = count.astype(jnp.float32)
    gradient = (without_radial(gradient, weight) if unit else gradient) * scale
    first, second = moments(mu, nu, gradient, b1, b2)
    after = moved(weight, first, second, rate, (1 - b1**step, 1 - b2**step), eps, unit)
    new = after, stored(first, mu.dtype, count), stored(second, nu.dtype, count)
    return tuple(jnp.where(keep, b, a) for a, b in zip((weight, mu, nu), new, strict=True))
