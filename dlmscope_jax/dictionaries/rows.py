"""Pure functions on rows and on decoder rows: per-row normalisation, unit decoder rows, a robust centre.

A decoder row and its activation can trade scale freely. Unit rows fix the trade, which makes activations comparable
between latents; removing the radial part of the gradient keeps Adam's moments from chasing a direction that the
renormalisation undoes (Gao et al. 2024, appendix A).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dlmscope_jax import kernels

_TINY = 1e-30


def unit_rows(weight: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """Each row divided by its Euclidean norm; zero rows stay zero."""
    return weight * jax.lax.rsqrt(jnp.maximum(jnp.square(weight).sum(axis=-1, keepdims=True), _TINY))


def row_norms(weight: Float[Array, "N D"]) -> Float[Array, " N"]:
    """The Euclidean norm of each row, with gradient 0 where a row is zero."""
    return jnp.sqrt(jnp.maximum(jnp.square(weight).sum(axis=-1), _TINY))


def typical_entry(width: int, kind: str) -> float:
    """Root mean square of an entry of the rows that a loss sees: training units give a row norm 1, ``normalise`` sqrt(width).

    It is also the size of a unit encoder row's pre-activation, so it converts thresholds and windows that others give for rows of
    norm sqrt(width).
    """
    return width**-0.5 if kind == "none" else 1.0


def renormalise(params: dict) -> dict:
    """Parameters with the rows of ``W_dec`` at unit norm."""
    return {**params, "W_dec": unit_rows(params["W_dec"])}


def project_gradient(params: dict, gradients: dict) -> dict:
    """Gradients without the part of ``W_dec``'s that points along each decoder row."""
    return {**gradients, "W_dec": kernels.tangential(gradients["W_dec"], params["W_dec"])}


def geometric_median(sample: Float[Array, "S D"], iterations: int = 100) -> Float[Array, " D"]:
    """The point with the least summed distance to the rows, by Weiszfeld's iteration from the mean.

    Outliers of a hundred times the usual norm, which language models have, move a mean but hardly this. Ends when a step
    moves less than 1e-5 of the mean distance, or after ``iterations``.
    """

    def step(state):
        i, centre, _ = state
        distance = jnp.sqrt(jnp.square(sample - centre).sum(axis=1))
        typical = jnp.mean(distance)
        # A row at the centre itself would have infinite weight; the floor is far below any distance that matters.
        weight = 1.0 / jnp.maximum(distance, 1e-6 * typical + _TINY)
        following = (weight[:, None] * sample).sum(axis=0) / weight.sum()
        return i + 1, following, jnp.linalg.norm(following - centre) > 1e-5 * typical

    def unfinished(state):
        i, _, moving = state
        return (i < iterations) & moving

    return jax.lax.while_loop(unfinished, step, (0, sample.mean(axis=0), True))[1]


def normalise(x: Float[Array, "B D"], kind: str) -> tuple[Float[Array, "B D"], Float[Array, "B 1"], Float[Array, "B 1"]]:
    """``(normalised rows, scale, offset)``; ``normalised * scale + offset`` undoes it as the library that defined it does.

    ``"layer_norm"``: mean off, divided by unbiased standard deviation + 1e-5; its scale is the deviation without the 1e-5 (OpenAI,
    SAELens). ``"unit_rms"``: norm sqrt(D) (SAELens' constant_norm_rescale); a zero row stays zero. ``"none"``: scale 1, offset 0.
    """
    if kind == "none":
        return x, jnp.ones((x.shape[0], 1), x.dtype), jnp.zeros((x.shape[0], 1), x.dtype)
    if kind == "unit_rms":
        scale = jnp.linalg.norm(x, axis=1, keepdims=True) * x.shape[1] ** -0.5
        scale = jnp.where(scale > 0, scale, 1.0)
        return x / scale, scale, jnp.zeros_like(scale)
    offset = x.mean(axis=1, keepdims=True)
    scale = jnp.std(x, axis=1, keepdims=True, ddof=1)
    return (x - offset) / (scale + 1e-5), scale, offset


def in_units_of(y: Float[Array, "B D_out"], scale: Float[Array, "B 1"], offset: Float[Array, "B 1"]) -> Float[Array, "B D_out"]:
    """What ``normalised * scale + offset`` must start from to give ``y``; where the scale is 0, a row of equal entries, ``y - offset``."""
    return (y - offset) / jnp.where(scale > 0, scale, 1.0)
