"""The k largest entries of each row: one contract, several implementations.

Contract, that of ``jax.lax.top_k``: values descending; equal values by ascending index; floats in their total order, so
that NaN (sign bit clear) ranks above +inf and 0.0 above -0.0. The wrapper owns shapes and the derivative; an
implementation sees a [B, N] matrix and nothing else. Which is the default where, and why: README.md.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels import dispatch
from dlmscope_jax.kernels.dispatch import Implementation, Problem

from . import grouped, reference, threshold

_GROUPED_FROM_WIDTH_CPU = 1024
_SHORT = 256  # rows up to here are sorted whole on accelerators: sorting candidates would sort as much


def _pallas_tpu(x: Array, k: int) -> tuple[Array, Array]:
    from . import pallas_tpu

    return pallas_tpu.topk(x, k)


def _pallas_gpu(x: Array, k: int) -> tuple[Array, Array]:
    from . import pallas_gpu

    return pallas_gpu.topk(x, k)


def _refused_by_tpu(problem: Problem, platform: str) -> str | None:
    from . import pallas_tpu

    return pallas_tpu.refuses(problem, platform)


def _refused_by_gpu(problem: Problem, platform: str) -> str | None:
    from . import pallas_gpu

    return pallas_gpu.refuses(problem, platform)


IMPLEMENTATIONS = {
    "reference": Implementation(reference.topk),
    "grouped": Implementation(grouped.topk, grouped.refuses),
    "threshold": Implementation(threshold.topk),
    "pallas_tpu": Implementation(_pallas_tpu, _refused_by_tpu),
    "pallas_gpu": Implementation(_pallas_gpu, _refused_by_gpu),
}


def default(problem: Problem, platform: str) -> str:
    """The implementation taken when none is named: no kernel that has not run on a device, nor can be divided over several."""
    if platform == "cpu":
        fits = problem.width >= _GROUPED_FROM_WIDTH_CPU and grouped.refuses(problem, platform) is None
        return "grouped" if fits and problem.width % grouped.group_size(problem.width, problem.k) == 0 else "reference"
    if problem.width <= _SHORT:
        return "reference"
    return "grouped" if grouped.refuses(problem, platform) is None else "threshold"


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _select(x: Array, k: int, implementation: str | None) -> tuple[Array, Array]:
    problem = Problem(x.shape[0], x.shape[1], k, dtype=x.dtype)
    return dispatch.run("topk", IMPLEMENTATIONS, default, problem, implementation, x, k=k)


@_select.defjvp
def _select_jvp(k, implementation, primals, tangents):
    values, indices = _select(primals[0], k, implementation)
    change = jnp.take_along_axis(tangents[0], indices, axis=1)
    return (values, indices), (change, jnp.zeros(indices.shape, jax.dtypes.float0))


def topk(x: Float[Array, "*batch N"], k: int, implementation: str | None = None) -> tuple[Float[Array, "*batch k"], Int[Array, "*batch k"]]:
    """The ``k`` largest entries of the last axis and their indices, exactly as ``jax.lax.top_k`` orders them.

    Differentiable in both modes; the derivative is the same for every implementation.

    Args:
      x: floating point, at least one axis.
      k: how many, static, 1 <= k <= N.
      implementation: ``"reference"``, ``"grouped"``, ``"threshold"``, ``"pallas_tpu"`` or ``"pallas_gpu"``; None picks by platform,
        dtype and shape.

    Returns:
      values [..., k] in the dtype of ``x`` and indices [..., k], int32.

    Raises:
      UserError: k outside 1..N, a dtype that is not floating, an implementation that is unknown or cannot do this shape.
    """
    if x.ndim == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"topk: needs a floating array with at least one axis, got {x.dtype}{list(x.shape)}")
    width = x.shape[-1]
    if not 1 <= k <= width:
        raise UserError(f"topk: k = {k} must lie between 1 and the {width} entries of a row")
    values, indices = _select(x.reshape(-1, width), k, implementation)
    shape = (*x.shape[:-1], k)
    return values.reshape(shape), indices.reshape(shape)
