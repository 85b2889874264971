"""One transformer block: attention and an MLP around the residual stream, with a site at every value worth reading."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from .attention import Visibility, attend, attention_pattern, mix
from .config import ModelConfig
from .edits import Edit, apply_edits
from .layers import ACTIVATIONS, norm, precision_of, project, rotate


@struct.dataclass
class Cache:
    """Keys and values of tokens that were read before.

    Attributes:
      k, v: [L, B, S, K, H]; the keys are rotated.
      position: [B, S] position of each entry, -1 where nothing is written or where padding is.
    """

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]
    position: Int[Array, "B S"]


@struct.dataclass
class Context:
    """What all blocks of one forward pass share.

    Attributes:
      see: which keys each query sees.
      rotary: cosines and sines, or None with learned positions.
      condition: [C] adaLN's condition vector, or None.
      columns: [B, T] where the tokens stand in the cache, None without one.
      edits: all edits of the call.
      slots: for each collected site, the row of its buffer that each layer writes (the last row is a bin).
    """

    see: Visibility
    rotary: tuple[Array, Array] | None = None
    condition: Array | None = None
    columns: Int[Array, "B T"] | None = None
    edits: tuple[Edit, ...] = ()
    slots: dict[str, Int[Array, " L"]] = struct.field(default_factory=dict)


class Block(nn.Module):
    """Attention, then an MLP, each behind a norm and added to the residual stream (in parallel where the config says so).

    Call it with ``Block(config, dtype).apply({"params": weights_of_this_layer}, x, ...)``.
    """

    config: ModelConfig
    dtype: jnp.dtype
    mesh: Mesh | None = None
    trains: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], layer: Int[Array, ""], context: Context, taps: dict[str, Array], cache: Cache | None = None
    ) -> tuple[Float[Array, "B T D"], dict[str, Array], Cache | None]:
        """Runs the block.

        Args:
          x: residual stream.
          layer: index of this block.
          context: what the blocks share.
          taps: buffers [n, B, T, ...] that collected sites are written into, one per site name.
          cache: keys and values of all layers; this block writes its own before it attends.

        Returns:
          The new residual stream, the buffers and the cache.
        """
        cfg, taps, seen = self.config, dict(taps), {}

        def site(name: str, value: Array) -> Array:
            value = apply_edits(context.edits, name, layer, value, seen)
            if name in taps:
                row = context.slots[name][layer]
                taps[name] = jax.lax.dynamic_update_index_in_dim(taps[name], value.astype(taps[name].dtype), row, 0)
            seen[name] = value
            return value

        shift_a, gain_a, gate_a, shift_m, gain_m, gate_m = self._modulation(context.condition)
        x = site("resid_pre", x)
        normed = site("attn_in", self._norm("attn_norm", x, site, modulate=(shift_a, gain_a)))
        attended, cache = self._attention(normed, layer, context, site, taps, cache)
        attended = self._added("attn", attended, gate_a, site)
        middle = x if cfg.parallel else site("resid_mid", x + attended)
        normed = site("mlp_in", self._norm("mlp_norm", middle, site, modulate=(shift_m, gain_m)))
        hidden = ACTIVATIONS[cfg.activation](self._linear("gate" if cfg.gated else "up", normed, cfg.d_mlp, cfg.mlp_bias))
        if cfg.gated:
            hidden = hidden * self._linear("up", normed, cfg.d_mlp, cfg.mlp_bias)
        mlp = self._added("mlp", self._linear("down", site("mlp_act", hidden), cfg.d_model, cfg.mlp_bias), gate_m, site)
        x = x + attended + mlp if cfg.parallel else middle + mlp
        return site("resid_post", x), taps, cache

    def _attention(
        self, normed: Array, layer: Array, context: Context, site: Any, taps: dict, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        cfg, precision = self.config, precision_of(self.dtype)
        batch, length, _ = normed.shape

        def heads(name: str, count: int) -> Array:
            value = self._linear(name, normed, count * cfg.head_dim, cfg.qkv_bias).reshape(batch, length, count, cfg.head_dim)
            return site(name, value)

        q, k, v = heads("q", cfg.n_heads), heads("k", cfg.n_kv_heads), heads("v", cfg.n_kv_heads)
        if cfg.qk_norm:
            q, k = self._norm("q_norm", q, site, kind="rms"), self._norm("k_norm", k, site, kind="rms")
        if context.rotary is not None:
            q, k = (rotate(a, *context.rotary, cfg.rope_float32) for a in (q, k))
        if cache is not None:
            rows = jnp.arange(batch)[:, None]
            put = lambda store, new: store.at[layer, rows, context.columns].set(new.astype(store.dtype))  # noqa: E731
            cache = replace(cache, k=put(cache.k, k), v=put(cache.v, v))
            k, v = (jax.lax.dynamic_index_in_dim(a, layer, 0, keepdims=False).astype(self.dtype) for a in (cache.k, cache.v))
        scale = cfg.head_dim**-0.5 if cfg.attention_scale is None else cfg.attention_scale
        if "attn_pattern" in taps or any(edit.site == "attn_pattern" for edit in context.edits):
            pattern = site("attn_pattern", attention_pattern(q, k, context.see, scale, cfg.attention_softcap, precision))
            mixed = mix(pattern, v, precision)
        else:
            mixed = attend(q, k, v, context.see, scale, cfg.attention_softcap, precision, self.mesh)
        z = site("z", mixed).reshape(batch, length, -1)
        return self._linear("o", z, cfg.d_model, cfg.out_bias), cache

    def _weight(self, name: str, *shape: int, std: float = 0.0) -> Array:
        ones = nn.initializers.zeros if self.config.norm_offset else nn.initializers.ones
        return self.param(name, nn.initializers.normal(std) if std else ones, shape, jnp.float32)

    def _linear(self, name: str, value: Array, width: int, bias: bool) -> Array:
        # what writes to the residual stream starts small, so that the stream's variance stays that of the embedding
        share = 2 * self.config.n_layers if name in ("o", "down") else 1
        weight = self._weight(name, value.shape[-1], width, std=1 / math.sqrt(value.shape[-1] * share))
        multiply = project if self.trains else partial(jnp.matmul, precision=precision_of(self.dtype))
        out = multiply(value, weight.astype(self.dtype))
        return out + self._bias(name, width).astype(self.dtype) if bias else out

    def _bias(self, name: str, width: int) -> Array:
        return self.param(f"{name}_bias", nn.initializers.zeros, (width,), jnp.float32)

    def _norm(self, name: str, x: Array, site: Any, modulate: tuple[Any, Any] = (None, None), kind: str | None = None) -> Array:
        cfg, width = self.config, x.shape[-1]
        bias = self._bias(name, width) if cfg.norm_bias and kind is None else None
        at_scale = lambda scale: site(f"{name}_scale", scale)  # noqa: E731
        return norm(x, self._weight(name, width), bias, cfg, at_scale, None if modulate[0] is None else modulate, kind)

    def _added(self, name: str, value: Array, gate: Array | None, site: Any) -> Array:
        """What is added to the residual stream: the projection's output, normed (Gemma-2) or gated (MDLM)."""
        if self.config.added_apart:
            value = site(f"{name}_raw", value)
        if self.config.post_norms:
            value = self._norm(f"{name}_post_norm", value, site)
        if gate is not None:
            value = value * gate.astype(value.dtype)
        return site(f"{name}_out", value)

    def _modulation(self, condition: Array | None) -> list[Array | None]:
        """adaLN's six vectors: shift, scale and gate of the attention, then of the MLP; None each where there is none."""
        if self.config.cond_dim is None:
            return [None] * 6
        width = 6 * self.config.d_model
        weight = self._weight("adaln", self.config.cond_dim, width, std=0.02)
        flat = jnp.matmul(condition, weight.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST) + self._bias("adaln", width).astype(
            jnp.float32
        )
        return jnp.split(flat, 6)
