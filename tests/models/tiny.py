"""Tiny configurations of the families, without torch: name -> ``(ModelConfig, DiffusionSpec | None)``."""

import dataclasses

from dlmscope_jax.models import DiffusionSpec, ModelConfig

LLAMA = ModelConfig(
    family="llama", vocab_size=97, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, d_mlp=48, norm_eps=1e-5, rope_theta=500.0,
    max_positions=64, attention="causal", bos_id=0, eos_id=1, pad_id=2,
)  # fmt: skip
GPT2 = dataclasses.replace(
    LLAMA, family="gpt2", n_kv_heads=4, rope_theta=10000.0, qkv_bias=True, tied_head=True, norm="layer", norm_bias=True,
    positions="learned", gated=False, activation="gelu_tanh", out_bias=True, mlp_bias=True,
)  # fmt: skip
NEOX = dataclasses.replace(
    LLAMA, family="gpt_neox", n_kv_heads=4, head_dim=8, qkv_bias=True, norm="layer", norm_bias=True, rotary_dim=4, parallel=True,
    gated=False, activation="gelu", out_bias=True, mlp_bias=True,
)  # fmt: skip

TINY: dict[str, tuple[ModelConfig, DiffusionSpec | None]] = {
    "llama": (LLAMA, None),
    "qwen2": (dataclasses.replace(LLAMA, family="qwen2", qkv_bias=True, tied_head=True), None),
    "dream": (dataclasses.replace(LLAMA, family="dream", attention="bidirectional", qkv_bias=True), DiffusionSpec(3, shift=True)),
    "llada": (
        dataclasses.replace(LLAMA, family="llada", attention="bidirectional", n_kv_heads=4, rope_float32=True),
        DiffusionSpec(3, shift=False),
    ),
    "gpt2": (GPT2, None),
    "diffugpt": (dataclasses.replace(GPT2, family="diffugpt", attention="bidirectional"), DiffusionSpec(3, shift=True)),
    "gpt_neox": (NEOX, None),
}
