"""The k largest entries of each row: one contract, several implementations.

Contract, that of ``jax.lax.top_k``: values descending; equal values by ascending index; floats in their total order, so
that NaN (sign bit clear) ranks above +inf and 0.0 above -0.0. The wrapper owns shapes, the treatment of half
precision and the derivative; an implementation sees a [B, N] matrix and nothing else.

Record behind the defaults (medians, float32, jax 0.10.2, 2-core CPU, B = 2048):

| N, k      | reference | grouped |
|-----------|-----------|---------|
| 2048, 32  | 20-21 ms  | 22-24 ms |
| 4096, 32  | 28-30 ms  | 24-27 ms |
| 16384, 32 | 79 ms     | 35 ms   |

Inside a whole training step (D = 192, k = 32; CPU time on a busy machine) ``grouped`` costs 93 against 87 ms at N = 2048 and
141 against 172 ms at N = 4096. Hence ``grouped`` on CPU from N = 4096 on. On other platforms nothing has been measured,
so the reference is the default.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlmscope_jax.errors import UserError

from . import grouped, reference

IMPLEMENTATIONS = {"reference": reference.topk, "grouped": grouped.topk}
_GROUPED_FROM_WIDTH_CPU = 4096


def default_implementation(width: int, k: int, platform: str) -> str:
    """The implementation that ``topk`` takes when none is named, for rows of ``width`` entries on ``platform``."""
    if platform == "cpu" and width >= _GROUPED_FROM_WIDTH_CPU and grouped.supports(width, k):
        return "grouped"
    return "reference"


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _select(x: Array, k: int, implementation: str) -> tuple[Array, Array]:
    return IMPLEMENTATIONS[implementation](x, k)


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
      implementation: ``"reference"`` or ``"grouped"``; None picks by platform and shape.

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
    platform = jax.default_backend()
    name = implementation or default_implementation(width, k, platform)
    if name not in IMPLEMENTATIONS:
        raise UserError(f"topk: implementation {name!r} is not known: one of {', '.join(IMPLEMENTATIONS)}")
    if name == "grouped" and not grouped.supports(width, k):
        raise UserError(f"topk: 'grouped' needs at least {4 * k} entries a row for k = {k}, got {width}: use 'reference'")
    rows = x.reshape(-1, width)
    # XLA's CPU custom call knows float32 only; half precision there is a full sort, 25 to 100 times slower
    widened = rows.astype(jnp.float32) if platform == "cpu" and rows.dtype.itemsize == 2 else rows
    values, indices = _select(widened, k, name)
    shape = (*x.shape[:-1], k)
    return values.astype(x.dtype).reshape(shape), indices.reshape(shape)
