"""The row-local update: everything that happens to a row of a dictionary between its gradient and the next step.

For each row w of a matrix, with moments m and v, gradient g and t the number of the update:

    g <- scale (g - (g . w) w / |w|^2)                 without its part along the row, where rows are held at unit norm
    m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2
    w <- w - rate (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)                      (Adam: Kingma and Ba 2015)
    w <- w / |w|                                       where rows are held at unit norm

``scale`` clips the gradient, which needs its norm over all rows first (``squared_norm``). Moments are float32 or bfloat16
(``rounding``); everything is computed in float32. README.md has traffic, defaults and measurements.
"""

from importlib import import_module
from types import ModuleType

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels import dispatch

from . import reference, strips

_LEAST_STRIPS = 4  # below, a matrix is in the cache anyhow


def _needs_a_cache(problem: dispatch.Problem, platform: str) -> str | None:
    return "is for loops over memory that a CPU keeps in its cache" if platform != "cpu" else None


def _pallas(name: str) -> dispatch.Implementation:
    """The module ``name``, which is imported when it is called, or asked what it refuses."""

    def module() -> ModuleType:
        return import_module(f"{__package__}.{name}")

    def run(*args: Array, **static: float) -> tuple[Array, Array, Array]:
        return module().row_update(*args, **static)

    return dispatch.Implementation(run, lambda problem, platform: module().refuses(problem, platform))


IMPLEMENTATIONS = {
    "reference": dispatch.Implementation(reference.row_update),
    "strips": dispatch.Implementation(strips.row_update, _needs_a_cache),
    "pallas_tpu": _pallas("pallas_tpu"),
    "pallas_gpu": _pallas("pallas_gpu"),
}


def default_implementation(problem: dispatch.Problem, platform: str) -> str:
    """The implementation taken when none is named: strips on a CPU where there are several, see README.md."""
    large = problem.width >= _LEAST_STRIPS * strips.strip_rows(problem.depth)
    return "strips" if platform == "cpu" and large else "reference"


def row_update(
    weight: Float[Array, "N D"],
    mu: Float[Array, "N D"],
    nu: Float[Array, "N D"],
    gradient: Float[Array, "N D"],
    *,
    rate: float | Float[Array, ""],
    count: int | Int[Array, ""],
    b1: float,
    b2: float,
    eps: float,
    scale: float | Float[Array, ""] = 1.0,
    keep: bool | Bool[Array, ""] = True,
    unit: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "N D"], Float[Array, "N D"], Float[Array, "N D"]]:
    """Adam on the rows of a matrix: the weight and both moments after an update.

    Args:
      weight: float32.
      mu, nu: first and second moment, float32 or bfloat16.
      gradient: of the loss, as it is; float32.
      rate: learning rate.
      count: number of this update, from 1.
      b1, b2, eps: Adam's, static.
      scale: factor of the gradient, for clipping.
      keep: False leaves all three as they are (a batch that is not finite).
      unit: whether rows of the weight are held at unit norm.
      implementation: ``"reference"``, ``"strips"``, ``"pallas_tpu"`` or ``"pallas_gpu"``; None picks by platform and size.

    Raises:
      UserError: shapes that differ or are no matrices; an implementation that is unknown or refuses.
    """
    shapes = {array.shape for array in (weight, mu, nu, gradient)}
    if len(shapes) != 1 or weight.ndim != 2:
        raise UserError(f"row_update: needs weight, moments and gradient of one shape [N, D], got {sorted(map(list, shapes))}")
    problem = dispatch.Problem(1, weight.shape[0], 1, weight.shape[1], mu.dtype)
    scalars = jnp.asarray(rate, jnp.float32), jnp.asarray(count, jnp.int32), jnp.asarray(scale, jnp.float32), jnp.asarray(keep, bool)
    arrays = (weight, mu, nu, gradient, *scalars)
    return dispatch.run(
        "row_update", IMPLEMENTATIONS, default_implementation, problem, implementation, *arrays, b1=b1, b2=b2, eps=eps, unit=unit
    )


def squared_norm(gradient: Float[Array, "*shape"], weight: Float[Array, "N D"] | None = None) -> Float[Array, ""]:
    """``sum |g|^2`` over all entries; with a ``weight`` without what of each row lies along its row, as ``unit`` removes it.

    |g - (g . u) u|^2 = |g|^2 - (g . u)^2 for a unit vector u, so that one reading of the gradient suffices.
    """
    square = jnp.square(gradient).sum()
    if weight is None:
        return square
    along = jnp.square((gradient * weight).sum(axis=-1)) / jnp.maximum(jnp.square(weight).sum(axis=-1), reference.TINY)
    return jnp.maximum(square - along.sum(), 0.0)


def tangential(gradient: Float[Array, "N D"], weight: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """Each row of the gradient without its part along the row of the weight, for other optimisers than ``row_update``'s."""
    return reference.without_radial(gradient, weight)


__all__ = ["IMPLEMENTATIONS", "default_implementation", "row_update", "squared_norm", "tangential"]
