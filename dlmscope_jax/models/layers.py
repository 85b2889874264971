"""One transformer block and its parts, as functions of arrays and a small Linen module that owns the weights."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .config import ModelConfig
from .edits import Edit, apply_edits


def rms_norm(x: Float[Array, "*n D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "*n D"]:
    """Llama's norm: normalised in float32, rounded to x's dtype, then multiplied by the weight."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * weight.astype(x.dtype)


def rope_tables(position_ids: Int[Array, "B T"], config: ModelConfig) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
    """Cosines and sines of the rotary angles, float32, ``H = head_dim`` with the two halves equal (NeoX layout)."""
    half = config.head_dim // 2
    frequency = 1.0 / (config.rope_theta ** (jnp.arange(half, dtype=jnp.float32) / half))
    if (scaling := config.rope_scaling) is not None:
        wavelength = 2 * math.pi / frequency
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        smooth = jnp.clip((scaling.original_max_positions / wavelength - low) / (high - low), 0.0, 1.0)
        frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
    angle = position_ids[..., None].astype(jnp.float32) * frequency
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B T N H"], cos: Float[Array, "B T H"], sin: Float[Array, "B T H"], in_float32: bool) -> Float[Array, "B T N H"]:
    """Rotates query or key heads; in float32 and rounded once (LLaDA), or with everything in x's dtype (Llama, Dream)."""
    dtype = jnp.float32 if in_float32 else x.dtype
    wide, cos, sin = x.astype(dtype), cos[:, :, None].astype(dtype), sin[:, :, None].astype(dtype)
    first, second = jnp.split(wide, 2, axis=-1)
    return (wide * cos + jnp.concatenate([-second, first], axis=-1) * sin).astype(x.dtype)


def attention_mask_of(config: ModelConfig, length: int, keep: Bool[Array, "B T"] | None) -> Bool[Array, "#B 1 #T T"] | None:
    """Which keys each query may see; None where every query sees every key."""
    mask = None
    if config.attention == "causal":
        mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
    if keep is not None:
        padding = keep.astype(bool)[:, None, None, :]
        mask = padding if mask is None else mask & padding
    return mask


def precision_of(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """float32 models multiply in float32 on every platform; bfloat16 is a choice, never a platform's default."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(x: Float[Array, "*n I"], w: Float[Array, "I O"], precision: jax.lax.Precision | None) -> Float[Array, "*n O"]:
    """``x @ w`` whose weight gradient is one plain product of two materialised matrices.

    The automatic rule makes XLA's CPU backend compute the transposed product and recompute what led to the incoming
    gradient inside a strided copy. Together with the rematerialised attention below this form took about half the time of a
    training step there (3.4 M parameters); elsewhere the products are the same.
    """
    return jnp.matmul(x, w, precision=precision)


def _project_forward(x: Array, w: Array, precision: jax.lax.Precision | None) -> tuple[Array, tuple[Array, Array]]:
    return jnp.matmul(x, w, precision=precision), (x, w)


def _project_backward(precision: jax.lax.Precision | None, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    dy = jax.lax.optimization_barrier(dy)
    rows, grads = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dx = jnp.matmul(dy, w.T, precision=precision)
    dw = jax.lax.dot_general(rows, grads, (((0,), (0,)), ((), ())), precision=precision)
    return dx, dw


project.defvjp(_project_forward, _project_backward)


class Block(nn.Module):
    """One pre-norm block: attention, then a gated MLP, each added to the residual stream.

    Call it with ``Block(config, dtype).apply({"params": weights_of_this_layer}, x, ...)``.
    """

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        layer: Int[Array, ""],
        cos: Float[Array, "B T H"],
        sin: Float[Array, "B T H"],
        mask: Bool[Array, "#B 1 #T T"] | None,
        edits: tuple[Edit, ...],
        taps: dict[str, Float[Array, "S B T _"]],
        slots: dict[str, Int[Array, " L"]],
    ) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "S B T _"]]]:
        """Runs the block.

        Args:
          x: residual stream.
          layer: index of this block.
          cos, sin: rotary tables.
          mask: which keys each query sees.
          edits: all edits of the call.
          taps: buffers that collected sites are written into, one per site name.
          slots: for each site name, the row of the buffer that each layer writes (the last row is a bin).

        Returns:
          The new residual stream and the buffers.
        """
        cfg, taps, seen = self.config, dict(taps), {}
        batch, length, _ = x.shape
        precision = precision_of(self.dtype)

        def weight(name: str, *shape: int, std: float = 0.0) -> Array:
            init = nn.initializers.normal(std) if std else nn.initializers.ones
            return self.param(name, init, shape, jnp.float32).astype(self.dtype)

        def linear(name: str, value: Array, width: int, bias: bool = False) -> Array:
            # what writes to the residual stream starts small, so that the stream's variance stays that of the embedding
            share = 2 * cfg.n_layers if name in ("o", "down") else 1
            out = project(value, weight(name, value.shape[-1], width, std=1 / math.sqrt(value.shape[-1] * share)), precision)
            return out + self.param(f"{name}_bias", nn.initializers.zeros, (width,), jnp.float32).astype(self.dtype) if bias else out

        def site(name: str, value: Array) -> Array:
            value = apply_edits(edits, name, layer, value, seen)
            if name in taps:
                taps[name] = jax.lax.dynamic_update_index_in_dim(taps[name], value.astype(taps[name].dtype), slots[name][layer], 0)
            seen[name] = value
            return value

        x = site("resid_pre", x)
        normed = rms_norm(x, weight("attn_norm", cfg.d_model), cfg.norm_eps)
        heads = lambda value, n: value.reshape(batch, length, n, cfg.head_dim)  # noqa: E731
        q = heads(linear("q", normed, cfg.n_heads * cfg.head_dim, cfg.qkv_bias), cfg.n_heads)
        k = heads(linear("k", normed, cfg.n_kv_heads * cfg.head_dim, cfg.qkv_bias), cfg.n_kv_heads)
        v = heads(linear("v", normed, cfg.n_kv_heads * cfg.head_dim, cfg.qkv_bias), cfg.n_kv_heads)
        q, k = rotate(q, cos, sin, cfg.rope_float32), rotate(k, cos, sin, cfg.rope_float32)
        attended = attend(q, k, v, mask, precision)
        x = x + site("attn_out", linear("o", attended, cfg.d_model))
        x = site("resid_mid", x)
        normed = site("mlp_in", rms_norm(x, weight("mlp_norm", cfg.d_model), cfg.norm_eps))
        hidden = site("mlp_act", nn.silu(linear("gate", normed, cfg.d_mlp)) * linear("up", normed, cfg.d_mlp))
        x = x + site("mlp_out", linear("down", hidden, cfg.d_model))
        return site("resid_post", x), taps


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Bool[Array, "#B 1 #T T"] | None,
    precision: jax.lax.Precision | None,
) -> Float[Array, "B T NH"]:
    """Grouped-query attention; scores and softmax in float32, heads concatenated.

    On a CPU the sequences of a batch go one after the other, so that the scores of one stay in cache (2 cores, 32 x 256
    tokens, 3 heads of 64: 21 ms against 83 ms for the whole batch at once); elsewhere the batch is one product.
    """
    batch, length, n_heads, width = q.shape
    q = q.reshape(batch, length, k.shape[2], n_heads // k.shape[2], width)

    def whole(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        scores = jnp.einsum("btkgh,bskh->bkgts", q, k, precision=precision, preferred_element_type=jnp.float32) / math.sqrt(width)
        if mask is not None:
            scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
        pattern = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bkgts,bskh->btkgh", pattern, v, precision=precision)

    def one_by_one(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        shared = None if mask is None or mask.shape[0] == batch else mask
        own = None if shared is not None else mask
        one = lambda a: whole(a[0][None], a[1][None], a[2][None], shared if a[3] is None else a[3][None])[0]  # noqa: E731
        return jax.lax.map(jax.checkpoint(one), (q, k, v, own))

    out = jax.lax.platform_dependent(q, k, v, mask, cpu=one_by_one, default=whole)
    return out.reshape(batch, length, n_heads * width)
