"""Ghost gradients: dead latents, made active through an exponential, learn to point at what the live ones leave over.

    g = exp(z_dead) W_dec,dead,   scaled to half the norm of r = y - y_hat,   error (g - r)^2 / |r|, scaled to the size of r^2

Every scale and r itself are constants (reference/transcoders.md 1.2). The published code takes r = x - y_hat, which points nowhere in
a transcoder; here it is the target minus the output.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dlmscope_jax.kernels.axes import ALONE, Axes

_HIGHEST = jax.lax.Precision.HIGHEST
_SMALL = 1e-6  # the reference's


def ghost_residual(
    pre: Float[Array, "B N"],
    weight: Float[Array, "N D_out"],
    residual: Float[Array, "B D_out"],
    dead: Bool[Array, " N"],
    entry: float,
    axes: Axes = ALONE,
) -> Float[Array, "B D_out"]:
    """A residual whose squared entries are those of ``residual``, and whose gradient is that of the dead latents' error.

    With G = (g - r)^2 / |r|, it is ``|r| / sqrt(G + 1e-6)``, held constant, times ``(g - r) / sqrt |r|``: squared, the reference's
    ``constant(r^2 / (G + 1e-6)) G``.

    Args:
      pre: pre-activations; only those of dead latents get a gradient.
      weight: decoder rows; the same.
      residual: target minus output; held constant.
      entry: the size of a pre-activation; the exponential is taken of ``pre / entry``, as the reference's rows have norm sqrt(width).
      axes: what divides rows and latents.

    Returns:
      Zeros when no latent is dead. A row without residual is zero.
    """
    residual = jax.lax.stop_gradient(residual)

    def some():
        exponent = jnp.where(dead, pre / entry, -jnp.inf)
        # A dead latent's exponent is negative, as a rule. Where it is not, the row's largest is taken off: g is rescaled anyhow.
        largest = jnp.maximum(axes.max_latents(jax.lax.stop_gradient(exponent).max(axis=1, keepdims=True)), 0.0)
        ghost = axes.sum_latents(jnp.matmul(jnp.exp(exponent - largest), weight, precision=_HIGHEST))
        length = jnp.linalg.norm(residual, axis=1, keepdims=True)
        half = jax.lax.stop_gradient(length / (_SMALL + 2.0 * jnp.linalg.norm(ghost, axis=1, keepdims=True)))
        error = (half * ghost - residual) / jnp.sqrt(jnp.maximum(length, 1e-30))
        return jax.lax.stop_gradient(jnp.abs(residual) / jnp.sqrt(jnp.square(error) + _SMALL)) * error

    return jax.lax.cond(axes.any_latents(dead), some, lambda: jnp.zeros_like(residual))
