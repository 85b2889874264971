"""Llama 3, 3.1, 3.2: causal, grouped queries, no biases, llama3 rotary scaling where the config asks for it."""

import dataclasses
from collections.abc import Collection
from typing import Any

from ..config import DiffusionSpec, ModelConfig
from .reading import Keys, Tensor, llama_tensors


def read(keys: Keys) -> tuple[ModelConfig, None]:
    """Reads a ``config.json`` of model type ``llama``."""
    keys.expect("attention_bias", False)
    keys.expect("mlp_bias", False)
    return read_llama_like(keys, "llama", qkv_bias=False, default_theta=10000.0), None


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
    return llama_tensors(config.qkv_bias, config.tied_head)


def write(config: ModelConfig, diffusion: DiffusionSpec | None) -> dict[str, Any]:
    """The ``config.json`` of such a model, in the hub's flat spelling."""
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False}
    return kind | write_llama_like(config)


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
