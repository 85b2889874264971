"""Tiny random networks, one for each way in which the switches of a configuration can stand together."""

import dataclasses

import jax
import jax.numpy as jnp

from dlmscope_jax.models import ModelConfig, Transformer, init_params

LLAMA = ModelConfig(
    family="llama", vocab_size=97, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, d_mlp=48, norm_eps=1e-5, rope_theta=500.0,
    max_positions=64, attention="causal",
)  # fmt: skip
_LAYER_NORM = dict(norm="layer", n_kv_heads=4, gated=False, mlp_bias=True)
_SWITCHES: dict[str, dict] = {
    "llama": {},
    "gpt2": dict(_LAYER_NORM, norm_bias=True, qkv_bias=True, out_bias=True, positions="learned", activation="gelu_tanh", tied_head=True),
    "neox": dict(_LAYER_NORM, norm_bias=True, qkv_bias=True, out_bias=True, rotary_dim=4, parallel=True, activation="gelu"),
    "gemma2": dict(
        norm_offset=True, post_norms=True, activation="gelu_tanh", scaled_embedding=True, tied_head=True, attention_scale=0.3,
        attention_softcap=5.0, logit_softcap=30.0, window=3, windowed=(True, False, True),
    ),
    "qwen3": dict(qk_norm=True, head_dim=12),
    "mdlm": dict(_LAYER_NORM, attention="bidirectional", cond_dim=12, head_bias=True, activation="gelu_tanh"),
    "dream": dict(attention="bidirectional", qkv_bias=True),
    "blocks": dict(attention="block_causal", block_length=4, qkv_bias=True),
}  # fmt: skip
NETWORKS = {name: dataclasses.replace(LLAMA, **switches) for name, switches in _SWITCHES.items()}


def random_network(config: ModelConfig, dtype: jnp.dtype = jnp.float32, seed: int = 0) -> tuple[Transformer, dict]:
    """A model and parameters whose norms and biases are away from one and zero, so that a forgotten one is noticed."""
    model = Transformer(config, None, dtype)
    leaves, tree = jax.tree.flatten(init_params(model, jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return model, jax.tree.unflatten(tree, [x + 0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])
