"""Adam with both moments in bfloat16: half of the optimiser's memory and of its traffic.

Rounding to nearest would break it. A bfloat16 has 8 significant bits, and a second moment with beta 0.999 changes by less than
half of the last one in a step, so it would never fall again. Moments are therefore rounded up or down in proportion to
what is cut off: the threshold walks through all 2^16 remainders, each element from a place of its own, so that the mean
over steps is right. Arithmetic is float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float, Int

_WALK = 40503  # 2^16 / golden ratio, odd: successive steps are far apart and none repeats before all have been there
_SPREAD = 2654435761  # 2^32 / golden ratio


def scale_by_adam_bf16(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam's direction, without a learning rate; the state is ``optax.ScaleByAdamState`` with bfloat16 moments."""

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.bfloat16), params)  # noqa: E731
        return optax.ScaleByAdamState(jnp.int32(0), zeros(), zeros())

    def update(gradients: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m.astype(jnp.float32) + (1 - b1) * g, state.mu, gradients)
        nu = jax.tree.map(lambda v, g: b2 * v.astype(jnp.float32) + (1 - b2) * g * g, state.nu, gradients)
        first, second = 1 - b1 ** count.astype(jnp.float32), 1 - b2 ** count.astype(jnp.float32)
        updates = jax.tree.map(lambda m, v: (m / first) / (jnp.sqrt(v / second) + eps), mu, nu)
        low = lambda tree: jax.tree.map(lambda leaf: round_fairly(leaf, count), tree)  # noqa: E731
        return updates, optax.ScaleByAdamState(count, low(mu), low(nu))

    return optax.GradientTransformation(init, update)


def round_fairly(x: Float[Array, "*shape"], step: Int[Array, ""]) -> BFloat16[Array, "*shape"]:
    """``x`` as bfloat16, up or down so that over 2^16 steps the mean is ``x``; exact values stay."""
    place = jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape) * jnp.uint32(_SPREAD) >> 16
    threshold = (place + step.astype(jnp.uint32) * jnp.uint32(_WALK)) & 0xFFFF
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) + threshold
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
