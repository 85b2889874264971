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
QWEN3 = dataclasses.replace(LLAMA, family="qwen3", head_dim=16, qk_norm=True, tied_head=True)
GEMMA2 = dataclasses.replace(
    LLAMA, family="gemma2", head_dim=16, tied_head=True, norm_offset=True, post_norms=True, activation="gelu_tanh", scaled_embedding=True,
    attention_scale=24**-0.5, attention_softcap=2.0, logit_softcap=5.0, window=4, windowed=(True, False, True),
)  # fmt: skip
MDLM = dataclasses.replace(
    LLAMA, family="mdlm", n_kv_heads=4, d_mlp=128, rope_theta=10000.0, attention="bidirectional", norm="layer", gated=False,
    activation="gelu_tanh", mlp_bias=True, head_bias=True, cond_dim=12, bos_id=None, eos_id=None, pad_id=None,
)  # fmt: skip
BLOCKS = {"attention": "block_causal", "block_length": 4}

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
    "gemma2": (GEMMA2, None),
    "qwen3": (QWEN3, None),
    "a2d-qwen3": (
        dataclasses.replace(QWEN3, family="a2d-qwen3", attention="bidirectional", tied_head=False),
        DiffusionSpec(3, shift=False),
    ),
    "a2d-qwen2": (
        dataclasses.replace(LLAMA, family="a2d-qwen2", attention="bidirectional", qkv_bias=True, tied_head=True),
        DiffusionSpec(3, shift=False),
    ),
    "sdar": (dataclasses.replace(QWEN3, family="sdar", tied_head=False, **BLOCKS), DiffusionSpec(3, shift=False)),
    "fast_dllm_qwen": (
        dataclasses.replace(LLAMA, family="fast_dllm_qwen", qkv_bias=True, tied_head=True, **BLOCKS),
        DiffusionSpec(3, shift=True),
    ),
    "illada": (
        dataclasses.replace(LLAMA, family="illada", attention="bidirectional", tied_head=True),
        DiffusionSpec(3, shift=False),
    ),
    "mdlm": (MDLM, DiffusionSpec(96, shift=False)),
}
