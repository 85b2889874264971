"""The parts of a transformer block as functions of arrays: norms, rotary positions, linear maps, activations."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .config import ModelConfig

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


def norm(
    x: Float[Array, "*n D"],
    weight: Float[Array, " D"],
    bias: Float[Array, " D"] | None,
    config: ModelConfig,
    at_scale: Callable[[Array], Array] = lambda scale: scale,
    modulate: tuple[Array, Array] | None = None,
    kind: str | None = None,
) -> Float[Array, "*n D"]:
    """The model's norm: ``(x - mean) / scale`` in float32, then its affine part; the result in x's dtype.

    Llama rounds before it multiplies by the weight; Gemma (``1 + weight``) and layer norms round last.

    Args:
      x: what is normed, over its last axis.
      weight, bias: the affine part.
      config: which kind of norm, and its epsilon.
      at_scale: sees the scale ``sqrt(mean(x^2) + eps)``, float32 [..., 1], and may change it: the place of its site.
      modulate: MDLM's shift and scale, ``y (1 + scale) + shift``.
      kind: ``"rms"`` or ``"layer"`` where it differs from the config's (query and key heads).
    """
    wide = x.astype(jnp.float32)
    if (kind or config.norm) == "layer":
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    scale = at_scale(jnp.sqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + config.norm_eps))
    normed = wide * (1.0 / scale)
    if (kind or config.norm) == "rms" and not config.norm_offset:
        return normed.astype(x.dtype) * weight.astype(x.dtype)
    normed = normed * (weight.astype(jnp.float32) + (1.0 if config.norm_offset else 0.0))
    if bias is not None:
        normed = normed + bias.astype(jnp.float32)
    if modulate is not None:
        shift, gain = (m.astype(jnp.float32) for m in modulate)
        normed = normed * (1.0 + gain) + shift
    return normed.astype(x.dtype)


def rope_tables(position_ids: Int[Array, "B T"], config: ModelConfig) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
    """Cosines and sines of the rotary angles, float32, ``R = rotary_dim or head_dim`` with the two halves equal (NeoX layout)."""
    half = (config.rotary_dim or config.head_dim) // 2
    frequency = 1.0 / (config.rope_theta ** (jnp.arange(half, dtype=jnp.float32) / half))
    if (scaling := config.rope_scaling) is not None:
        wavelength = 2 * math.pi / frequency
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        smooth = jnp.clip((scaling.original_max_positions / wavelength - low) / (high - low), 0.0, 1.0)
        frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
    angle = position_ids[..., None].astype(jnp.float32) * frequency
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B T N H"], cos: Float[Array, "B T R"], sin: Float[Array, "B T R"], in_float32: bool) -> Float[Array, "B T N H"]:
    """Rotates the first R dims of query or key heads; in float32 and rounded once (LLaDA), or all in x's dtype (Llama, Dream)."""
    dtype, width = jnp.float32 if in_float32 else x.dtype, cos.shape[-1]
    turned, cos, sin = x[..., :width].astype(dtype), cos[:, :, None].astype(dtype), sin[:, :, None].astype(dtype)
    first, second = jnp.split(turned, 2, axis=-1)
    turned = (turned * cos + jnp.concatenate([-second, first], axis=-1) * sin).astype(x.dtype)
    return turned if width == x.shape[-1] else jnp.concatenate([turned, x[..., width:]], axis=-1)


def precision_of(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """float32 models multiply in float32 on every platform; bfloat16 is a choice, never a platform's default."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def softcap(x: Float[Array, "*n"], cap: float | None) -> Float[Array, "*n"]:
    """``cap tanh(x / cap)``, or x without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


@jax.custom_vjp
def project(x: Float[Array, "*n I"], w: Float[Array, "I O"]) -> Float[Array, "*n O"]:
    """``x @ w``, at the precision of its dtype, whose weight gradient is one plain product of two materialised matrices.

    The automatic rule makes XLA's CPU backend compute the transposed product and recompute what led to the incoming
    gradient inside a strided copy. Together with the rematerialised attention this form took about half the time of a
    training step there (3.4 M parameters); elsewhere the products are the same.
    """
    return jnp.matmul(x, w, precision=precision_of(x.dtype))


def _project_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return jnp.matmul(x, w, precision=precision_of(x.dtype)), (x, w)


def _project_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    precision = precision_of(x.dtype)
    dy = jax.lax.optimization_barrier(dy)
    rows, grads = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dx = jnp.matmul(dy, w.T, precision=precision)
    dw = jax.lax.dot_general(rows, grads, (((0,), (0,)), ((), ())), precision=precision)
    return dx, dw


project.defvjp(_project_forward, _project_backward)
