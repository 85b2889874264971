"""Decoding and the encoder's gradient, each with one backward rule for both kinds of codes and all implementations.

Where a code's values sit, its ``places``, is ``(indices,)`` for a row-sparse and ``(rows, latents)`` for a flat-sparse code; with that
the two kinds differ in the primitive that is called and in nothing else:

    decode:   y = combine(values)      d values = dots(dy)      d weight = outer(values, dy)
    encoder:  z = <x - shift, weight> + bias at the places
              d weight = outer(dz, x - shift)      d bias = sums(dz)      d x = combine(dz)      d shift = -(d bias) @ weight

Nothing of the size [B, N] or [B, k, D] arises. The shift is shared by the batch, so its gradient is made of the batch sum, N D work and
not B k D; ``d x`` stands for itself, and is not computed where nobody asks for it.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlmscope_jax.kernels import dispatch

from . import products, reference

Places = tuple[Array] | tuple[Array, Array]


def _combine(values: Array, places: Places, weight: Array, n_rows: int, name: str | None) -> Array:
    if len(places) == 1:
        return products.combine(values, places[0], weight, name)
    return products.combine_flat(values, places[0], places[1], weight, n_rows, name)


def _dots(rows: Array, places: Places, weight: Array, name: str | None) -> Array:
    if len(places) == 1:
        return products.dots(rows, places[0], weight, name)
    return products.dots_flat(rows, places[0], places[1], weight, name)


def _outer(values: Array, places: Places, rows: Array, width: int, name: str | None) -> Array:
    if len(places) == 1:
        return products.outer(values, places[0], rows, width, name)
    return products.outer_flat(values, places[0], places[1], rows, width, name)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _decode(values: Array, places: Places, weight: Array, n_rows: int, name: str | None) -> Array:
    return _combine(values, places, weight, n_rows, name)


def _decode_forward(values, places, weight, n_rows, name):
    return _decode(values, places, weight, n_rows, name), (values, places, weight)


def _decode_backward(n_rows, name, saved, cotangent):
    values, places, weight = saved
    d_values = _dots(cotangent, places, weight, name)
    d_weight = _outer(values, places, cotangent, weight.shape[0], name)
    return d_values.astype(values.dtype), None, d_weight.astype(weight.dtype)


_decode.defvjp(_decode_forward, _decode_backward)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attach(values, places, x, weight, bias, shift, name):
    return values


def _attach_forward(values, places, x, weight, bias, shift, name):
    return values, (places, x, weight, bias, shift)


def _attach_backward(name, saved, cotangent):
    places, x, weight, bias, shift = saved
    d_bias = products.sums(cotangent.reshape(-1), places[-1].reshape(-1), weight.shape[0])
    d_weight = _outer(cotangent, places, x if shift is None else x - shift, weight.shape[0], name)
    d_x = _combine(cotangent, places, weight, x.shape[0], name).astype(x.dtype)
    d_shift = None if shift is None else -reference.matmul(d_bias, weight).astype(shift.dtype)
    return jnp.zeros_like(cotangent), None, d_x, d_weight.astype(weight.dtype), d_bias.astype(bias.dtype), d_shift


_attach.defvjp(_attach_forward, _attach_backward)


def decode(
    values: Float[Array, "B k"], indices: Int[Array, "B k"], weight: Float[Array, "N D"], implementation: str | None = None
) -> Float[Array, "B D"]:
    """``sum_j values[b, j] * weight[indices[b, j]]``, differentiable (reverse mode) in ``values`` and ``weight``.

    Args:
      values, indices: the code; an index may occur twice in a row, its values then add.
      weight: one latent a row; bf16 is multiplied and added in float32.
      implementation: of the product and of both gradients; None picks by platform and N / k.

    Raises:
      UserError: an implementation that is unknown, or that cannot do this here.
    """
    return _decode(values, (indices,), weight, values.shape[0], implementation)


def decode_flat(
    values: Float[Array, " M"],
    rows: Int[Array, " M"],
    latents: Int[Array, " M"],
    weight: Float[Array, "N D"],
    n_rows: int,
    implementation: str | None = None,
) -> Float[Array, "B D"]:
    """``out[b] = sum over m with rows[m] = b of values[m] * weight[latents[m]]``, differentiable (reverse) in values and weight.

    Args:
      n_rows: B; a row without a pair is 0.
      implementation: as for ``decode``.

    Raises:
      UserError: an implementation that is unknown, or that cannot do this here.
    """
    return _decode(values, (rows, latents), weight, n_rows, implementation)


def decode_prefixes(
    values: Float[Array, " M"],
    rows: Int[Array, " M"],
    latents: Int[Array, " M"],
    weight: Float[Array, "N D"],
    n_rows: int,
    prefixes: tuple[int, ...],
    implementation: str | None = None,
) -> Float[Array, "G B D"]:
    """What each prefix of the latents decodes to: out[g] is ``decode_flat`` of the pairs with ``latents < prefixes[g]``.

    One pass: every pair is added to the accumulator of the first prefix that holds it, and the G accumulators are summed up
    afterwards. The gradient takes one pass as well.

    Args:
      prefixes: ascending, the last one N.
      implementation: as for ``decode``; ``"reference"`` writes the code out once and multiplies each part of it.
    """
    if implementation == "reference":
        parts = _dense_parts(values, rows, latents, weight, n_rows, prefixes)
    elif implementation is not None:
        parts = _sparse_parts(values, rows, latents, weight, n_rows, prefixes, implementation)
    else:
        problem = products.flat_problem(n_rows, weight.shape[0], weight, values)
        table = {"dense": dispatch.Implementation(_dense_parts), "sparse": dispatch.Implementation(_sparse_parts)}
        args = (values, rows, latents, weight)
        parts = dispatch.run("prefixes", table, _prefixes_rule, problem, None, *args, n_rows=n_rows, prefixes=prefixes)
    return jnp.stack(list(itertools.accumulate(parts[g] for g in range(len(prefixes)))))


def _prefixes_rule(problem: dispatch.Problem, platform: str) -> str:
    return "sparse" if products.sparse_wins(problem, platform) else "dense"


def _sparse_parts(
    values: Array, rows: Array, latents: Array, weight: Array, n_rows: int, prefixes: tuple[int, ...], name: str | None = None
) -> Array:
    """What the latents that each prefix adds decode to: one code of G B rows."""
    first = jnp.searchsorted(jnp.array(prefixes, latents.dtype), latents, side="right").astype(rows.dtype)
    parts = decode_flat(values, first * n_rows + rows, latents, weight, len(prefixes) * n_rows, name)
    return parts.reshape(len(prefixes), n_rows, weight.shape[1])


def _dense_parts(values: Array, rows: Array, latents: Array, weight: Array, n_rows: int, prefixes: tuple[int, ...]) -> Array:
    """The same by matrix products of the parts of one dense code."""
    code = reference.scatter_flat(values, rows, latents, n_rows, weight.shape[0])
    bounds = zip((0, *prefixes), prefixes, strict=False)
    return jnp.stack([reference.matmul(code[:, low:high], weight[low:high]) for low, high in bounds])


def with_encoder_gradient(
    values: Float[Array, "B k"],
    indices: Int[Array, "B k"],
    x: Float[Array, "B D"],
    weight: Float[Array, "N D"],
    bias: Float[Array, " N"],
    shift: Float[Array, " D"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B k"]:
    """``values`` unchanged, with the gradient of ``preactivations(x, weight, bias, shift)`` at ``indices``.

    The dense pre-activations that a selection was made from are computed without gradient; this puts the gradient back
    for the selected entries alone, so that no [B, N] cotangent arises.

    Args:
      values: the pre-activations at ``indices``, already computed.
      indices: distinct within a row.
      implementation: as for ``decode``.
    """
    return _attach(values, (indices,), x, weight, bias, shift, implementation)


def with_flat_encoder_gradient(
    values: Float[Array, " M"],
    rows: Int[Array, " M"],
    latents: Int[Array, " M"],
    x: Float[Array, "B D"],
    weight: Float[Array, "N D"],
    bias: Float[Array, " N"],
    shift: Float[Array, " D"] | None = None,
    implementation: str | None = None,
) -> Float[Array, " M"]:
    """As ``with_encoder_gradient``, for the pre-activations of the pairs (rows[m], latents[m])."""
    return _attach(values, (rows, latents), x, weight, bias, shift, implementation)
