"""Resampling: dead latents begin again in the direction of rows that are reconstructed badly (Bricken et al. 2023).

Each dead latent draws a row with probability proportional to the square of the row's loss. Its decoder row becomes the unit
vector of what the dictionary adds to its biases there, its encoder row points to the centred input with 0.2 of the mean
norm of the live ones, its biases are 0, its threshold is what it was at first, and the optimiser forgets it. Where nothing is
subtracted before encoding (most transcoders), the centre is the batch's mean and the biases take it off: activations would else have
a mean that all of these latents share.

On a mesh every device draws for all latents from all rows, which it is sent for that, and takes what was drawn for its own: no draw
depends on the mesh.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dlmscope_jax.dictionaries import Dictionary, JumpReLU, unit_rows
from dlmscope_jax.kernels.axes import ALONE, Axes

_ENCODER_SHARE = 0.2
_BIASES = ("b_enc", "b_gate", "b_mag")
_NOT_OF_LATENTS = ("b_dec", "b_in", "W_skip")


def resample(
    dictionary: Dictionary,
    key: Array,
    params: dict,
    opt_state: Any,
    x: Float[Array, "B D"],
    target: Float[Array, "B D_out"] | None,
    dead: Bool[Array, " N"],
    axes: Axes = ALONE,
) -> tuple[dict, Any]:
    """Parameters and optimiser state in which the ``dead`` latents begin again; the others are untouched.

    Args:
      key: of the draw.
      x, target: rows of one batch in training units; ``target`` is None for an autoencoder.
      axes: what divides rows and latents.
    """
    inputs, outputs, error = axes.gather_rows(dictionary.row_errors(params, x, target, axes))
    drawn = jax.random.categorical(key, 2.0 * jnp.log(error + 1e-30), shape=(dictionary.width,))
    if axes.latents is not None:
        drawn = jax.lax.dynamic_slice_in_dim(drawn, axes.first_latent(len(dead)), len(dead))
    lengths, n_live = axes.sum_latents((jnp.where(dead, 0.0, jnp.linalg.norm(params["W_enc"], axis=1)).sum(), (~dead).sum()))
    live = lengths / jnp.maximum(1, n_live)
    length = _ENCODER_SHARE * jnp.where(n_live == 0, 1.0, live)
    centre = jnp.zeros(inputs.shape[1]) if dictionary.centred else inputs.mean(axis=0)
    encoder = length * unit_rows(inputs[drawn] - centre)
    bias = -jnp.matmul(encoder, centre, precision=jax.lax.Precision.HIGHEST)
    fresh = {
        "W_enc": encoder,
        "W_dec": unit_rows(outputs[drawn]),
        **{name: bias for name in _BIASES if name in params},
        **({"r_mag": jnp.zeros_like(params["r_mag"])} if "r_mag" in params else {}),
    }
    if isinstance(dictionary, JumpReLU):
        fresh["threshold"] = jnp.full_like(params["threshold"], dictionary.first_threshold)
    fresh = {name: jnp.where(_rows(dead, value), value, params[name]) for name, value in fresh.items()}

    def forget(path: Any, leaf: Array) -> Array:
        name = getattr(path[-1], "key", None) if path else None
        of_latents = name in params and name not in _NOT_OF_LATENTS and leaf.shape[:1] == dead.shape
        return jnp.where(_rows(dead, leaf), jnp.zeros_like(leaf), leaf) if of_latents else leaf

    return {**params, **fresh}, jax.tree_util.tree_map_with_path(forget, opt_state)


def _rows(dead: Bool[Array, " N"], leaf: Array) -> Array:
    return dead.reshape(-1, *[1] * (leaf.ndim - 1))
