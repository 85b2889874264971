"""Corruption: which tokens a masked diffusion model does not get to see."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dlmscope_jax.models.config import DiffusionSpec


def corrupt(
    key: Key[Array, ""],
    tokens: Int[Array, "B T"],
    rate: float | Float[Array, ""] | Float[Array, " B"],
    spec: DiffusionSpec,
    protect: Bool[Array, "B T"] | None = None,
    exact: bool = False,
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Replaces a random part of the tokens by the mask token.

    Position 0 is never masked: a shifted model has no prediction for it, and the two kinds of model are compared on the
    same masks.

    Args:
      key: random key; the same key, shape and rate give the same masks whatever the tokens are.
      tokens: token ids.
      rate: share of tokens to mask, one number or one a row.
      spec: gives the mask token.
      protect: True where a token is never masked (padding, prompt).
      exact: False masks each eligible token independently with probability ``rate``; True masks exactly
        ``round(rate * eligible)`` tokens of a row, at least one where the row has one, uniformly among the eligible.

    Returns:
      The corrupted tokens and where they are masked.
    """
    eligible = jnp.broadcast_to(jnp.arange(tokens.shape[1]) > 0, tokens.shape)
    if protect is not None:
        eligible &= ~protect
    rate = jnp.broadcast_to(jnp.asarray(rate, jnp.float32), tokens.shape[:1])
    uniform = jax.random.uniform(key, tokens.shape)
    if exact:
        available = eligible.sum(axis=1)
        count = jnp.round(rate * available.astype(jnp.float32)).astype(jnp.int32)
        count = jnp.minimum(jnp.maximum(count, 1), available)
        is_masked = eligible & (rank(jnp.where(eligible, uniform, jnp.inf)) < count[:, None])
    else:
        is_masked = eligible & (uniform < rate[:, None])
    return jnp.where(is_masked, jnp.asarray(spec.mask_id, tokens.dtype), tokens), is_masked


def rank(score: Float[Array, "B T"]) -> Int[Array, "B T"]:
    """Place of each entry in its row, 0 for the smallest; ties resolve to the lowest index."""
    order = jnp.argsort(score, axis=1, stable=True)
    return jnp.argsort(order, axis=1, stable=True)


def stratified_times(key: Key[Array, ""], n: int) -> Float[Array, " n"]:
    """``n`` times in [0, 1), each uniform, evenly spread: ``(u + i / n) mod 1`` with one u (Kingma et al. 2021)."""
    return (jax.random.uniform(key) + jnp.arange(n, dtype=jnp.float32) / n) % 1.0


def training_rates(key: Key[Array, ""], rows: int, spec: DiffusionSpec) -> Float[Array, " B"]:
    """Corruption rate of each row of a training batch: ``p = (1 - eps) t + eps`` (LLaDA), t stratified over the batch."""
    return (1.0 - spec.eps) * stratified_times(key, rows) + spec.eps
