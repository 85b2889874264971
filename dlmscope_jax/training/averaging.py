"""An exponential moving average of the weights: a steadier dictionary than the last step's (Gao et al. 2024 use decay 0.999).

a_t = decay a_{t-1} + (1 - decay) w_t from a_0 = 0; the average is a_t / (1 - decay^t), a weighted mean of w_1 ... w_t.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def follow(average: dict, params: dict, decay: Float[Array, ""]) -> dict:
    """One step of the average."""
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)


def corrected(average: dict, params: dict, decay: Float[Array, ""], updates: Int[Array, ""]) -> dict:
    """The average after so many ``updates``; ``params`` where there was none."""
    weight = 1 - decay ** updates.astype(jnp.float32)
    return jax.tree.map(lambda a, p: jnp.where(updates > 0, a / jnp.where(updates > 0, weight, 1.0), p), average, params)
