"""What a dictionary's insertion is compared with: other values put in the place of the same activations.

A dictionary that harms the loss little is only worth something if the same amount of damage done blindly harms it more.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CONDITIONS = ("clean", "spliced", "zero", "mean", "noise", "untrained")


def matched_noise(keys: Array, error: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Isotropic noise that has, row by row, the norm of that row's own reconstruction error.

    Args:
      keys: [B] random keys, one a block, so that the noise does not depend on how blocks are batched.
      error: ``x - x_hat``, float32.
    """
    noise = jax.vmap(lambda key: jax.random.normal(key, error.shape[1:], jnp.float32))(keys)
    size = jnp.linalg.norm(error, axis=-1, keepdims=True)
    return noise * (size / jnp.linalg.norm(noise, axis=-1, keepdims=True))


def mean_by_state(is_masked: Bool[Array, "B T"], means: Float[Array, "2 D"]) -> Float[Array, "B T D"]:
    """The mean of each row's own mask state: ``means[1]`` at masked inputs, ``means[0]`` at visible ones.

    The state is that of the row's own position, in a shifted model too (where the row also predicts its right
    neighbour): it is the input that splits the activations into two clouds.
    """
    return means[is_masked.astype(jnp.int32)]


def replacements(
    spec: Any,
    params: Any,
    untrained: Any,
    x: Float[Array, "B T D"],
    is_masked: Bool[Array, "B T"],
    means: Float[Array, "2 D"],
    keys: Array,
    where: Bool[Array, "B T"],
    read: Float[Array, "B T D_in"] | None = None,
) -> Float[Array, "C B T D"]:
    """The values of every condition, in the order of ``CONDITIONS``; positions outside ``where`` keep ``x``.

    Args:
      spec: the dictionary's description; static.
      params, untrained: its parameters, and those of an untrained one of the same shape.
      x: activations at the site that the dictionary writes.
      is_masked: the mask state of each position.
      means: rows 0 visible, 1 masked.
      keys: [B] keys of the noise.
      where: positions that are replaced.
      read: what a transcoder reads; None: ``x``.
    """
    x = x.astype(jnp.float32)
    read = x if read is None else read.astype(jnp.float32)
    spliced = spec.reconstruct(params, read).astype(jnp.float32)
    values = jnp.stack(
        [
            x,
            spliced,
            jnp.zeros_like(x),
            mean_by_state(is_masked, means.astype(jnp.float32)),
            x + matched_noise(keys, x - spliced),
            spec.reconstruct(untrained, read).astype(jnp.float32),
        ]
    )
    return jnp.where(where[None, :, :, None], values, x[None])


@jax.jit
def block_keys(key: Array, rate_index: int | Int[Array, " B"], blocks: Int[Array, " B"]) -> Array:
    """[B] keys, one a block: a function of the seed, the rate and the block, never of the batch it falls into."""
    rate_index = jnp.broadcast_to(jnp.asarray(rate_index, jnp.int32), blocks.shape)
    return jax.vmap(lambda r, i: jax.random.fold_in(jax.random.fold_in(key, r), i))(rate_index, blocks)
