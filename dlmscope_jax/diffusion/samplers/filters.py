"""Which tokens may be drawn at all."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def keep_top_p(logits: Float[Array, "*n V"], top_p: float | None) -> Float[Array, "*n V"]:
    """Keeps the smallest set of tokens whose probability exceeds ``top_p``, the rest at the lowest float; equals stay."""
    if top_p is None or top_p >= 1:
        return logits
    descending = -jnp.sort(-logits, axis=-1)
    before = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1)
    kept = 1 + (before[..., :-1] <= top_p).sum(axis=-1, keepdims=True)  # the token that crosses the threshold is kept
    lowest = jnp.take_along_axis(descending, kept - 1, axis=-1)
    return jnp.where(logits < lowest, jnp.finfo(logits.dtype).min, logits)


def keep_top_k(logits: Float[Array, "*n V"], top_k: int | None) -> Float[Array, "*n V"]:
    """Keeps the ``top_k`` largest, the rest at the lowest float; equals of the last one stay."""
    if top_k is None or top_k >= logits.shape[-1]:
        return logits
    lowest = jax.lax.top_k(logits, top_k)[0][..., -1:]
    return jnp.where(logits < lowest, jnp.finfo(logits.dtype).min, logits)
