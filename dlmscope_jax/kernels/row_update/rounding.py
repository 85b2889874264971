"""Moments in bfloat16: half of the optimiser's memory and of its traffic.

Rounding to nearest would break Adam. A bfloat16 has 8 significant bits, and a second moment with beta 0.999 changes by less than
half of the last one in a step, so it would never fall again. Moments are therefore rounded up or down in proportion to
what is cut off: the threshold walks through all 2^16 remainders, each element from a place of its own, so that the mean
over steps is right.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

_WALK = 40503  # 2^16 / golden ratio, odd: successive steps are far apart and none repeats before all have been there
_SPREAD = 2654435761  # 2^32 / golden ratio


def round_fairly(x: Float[Array, "*shape"], step: Int[Array, ""], first: int | Int[Array, ""] = 0) -> BFloat16[Array, "*shape"]:
    """``x`` as bfloat16, up or down so that over 2^16 steps the mean is ``x``; exact values stay.

    Args:
      step: of the optimiser.
      first: the place of the first element, where ``x`` is a strip of something larger.
    """
    place = jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape) + jnp.asarray(first).astype(jnp.uint32)
    return rounded(x, step, place)


def rounded(x: Float[Array, "*shape"], step: Int[Array, ""], place: Int[Array, "*shape"]) -> BFloat16[Array, "*shape"]:
    """``round_fairly`` where the elements' places are known: unsigned, their numbers in row-major order."""
    threshold = ((place * jnp.uint32(_SPREAD) >> 16) + step.astype(jnp.uint32) * jnp.uint32(_WALK)) & 0xFFFF
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) + threshold
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def stored(x: Float[Array, "*shape"], dtype: jnp.dtype, step: Int[Array, ""], first: int | Int[Array, ""] = 0) -> Array:
    """A moment as it is kept: float32 as it is, bfloat16 rounded fairly."""
    return round_fairly(x, step, first) if dtype == jnp.bfloat16 else x
