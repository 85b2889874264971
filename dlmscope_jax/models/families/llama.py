"""Llama 3, 3.1, 3.2: causal, grouped queries, llama3 rotary scaling and biases where the config asks for them."""

import dataclasses
from collections.abc import Collection
from typing import Any

from ..config import DiffusionSpec, ModelConfig
from .reading import Keys, Tensor, block_tensors, llama_tensors


def read(keys: Keys) -> tuple[ModelConfig, None]:
    """Reads a ``config.json`` of model type ``llama``; the published models have no biases."""
    attention_bias = keys.take("attention_bias", default=False, kind=bool)
    mlp_bias = keys.take("mlp_bias", default=False, kind=bool)
    config = read_llama_like(keys, "llama", qkv_bias=attention_bias, default_theta=10000.0)
    return dataclasses.replace(config, out_bias=attention_bias, mlp_bias=mlp_bias), None


def read_llama_like(keys: Keys, family: str, qkv_bias: bool, default_theta: float, attention: str = "causal") -> ModelConfig:
    """What Llama, Qwen2 and Dream spell alike."""
    keys.expect("hidden_act", "silu")
    d_model, n_heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    theta, scaling = keys.rope(default_theta)
    return ModelConfig(
        family=family,
        vocab_size=keys.size("vocab_size"),
        d_model=d_model,
        n_layers=keys.size("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=keys.size("num_key_value_heads", default=n_heads),
        head_dim=keys.size("head_dim", default=d_model // n_heads),
        d_mlp=keys.size("intermediate_size"),
        norm_eps=keys.take("rms_norm_eps", default=1e-6, kind=float),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=keys.size("max_position_embeddings", default=2048),
        attention=attention,
        qkv_bias=qkv_bias,
        tied_head=keys.take("tie_word_embeddings", default=False, kind=bool),
        bos_id=keys.token("bos_token_id"),
        eos_id=keys.token("eos_token_id"),
        pad_id=keys.token("pad_token_id"),
    )


def tensors(config: ModelConfig, names: Collection[str] = frozenset()) -> dict[tuple[str, ...], Tensor]:
    """Our paths -> tensor names."""
    biases = {"o_bias": "self_attn.o_proj.bias"} if config.out_bias else {}
    if config.mlp_bias:
        biases |= {f"{p}_bias": f"mlp.{p}_proj.bias" for p in ("gate", "up", "down")}
    return llama_tensors(config.qkv_bias, config.tied_head) | block_tensors("model.layers.{layer}", biases)


def write(config: ModelConfig, diffusion: DiffusionSpec | None) -> dict[str, Any]:
    """The ``config.json`` of such a model, in the hub's flat spelling."""
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return kind | {"attention_bias": config.out_bias, "mlp_bias": config.mlp_bias} | write_llama_like(config)


def write_llama_like(config: ModelConfig) -> dict[str, Any]:
    """What Llama, Qwen2 and Dream spell alike."""
    scaling = None
    if config.rope_scaling is not None:
        scaling = {"rope_type": "llama3"} | dataclasses.asdict(config.rope_scaling)
        scaling["original_max_position_embeddings"] = scaling.pop("original_max_positions")
    return {
        "hidden_act": "silu",
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "max_position_embeddings": config.max_positions,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
        "torch_dtype": "bfloat16",
    }
