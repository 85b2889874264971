"""Llama 3, 3.1, 3.2: causal, grouped queries, llama3 rotary scaling and biases where the config asks for them."""

import dataclasses
from collections.abc import Collection
from typing import Any

from dlmscope_jax.errors import UserError

from ..config import DiffusionSpec, ModelConfig
from .reading import Keys, Tensor, block_tensors, checked, llama_tensors, shape_keys


def read(keys: Keys) -> tuple[ModelConfig, None]:
    """Reads a ``config.json`` of model type ``llama``; the published models have no biases."""
    attention_bias = keys.take("attention_bias", default=False, kind=bool)
    mlp_bias = keys.take("mlp_bias", default=False, kind=bool)
    config = read_llama_like(keys, "llama", qkv_bias=attention_bias, default_theta=10000.0)
    return checked(keys, dataclasses.replace(config, out_bias=attention_bias, mlp_bias=mlp_bias), None)


def read_llama_like(
    keys: Keys, family: str, qkv_bias: bool, default_theta: float, attention: str = "causal", head_dim: int | None = None
) -> ModelConfig:
    """What Llama, the Qwens and the diffusion models made from them spell alike.

    Args:
      head_dim: width of a head where the file does not say it; None: the heads share the network's width.

    Raises:
      UserError: for layers with windows, in either spelling, or another activation.
    """
    keys.expect("hidden_act", "silu")
    keys.expect("use_sliding_window", False)
    others = sorted({str(kind) for kind in keys.take("layer_types", default=[], kind=list)} - {"full_attention"})
    if others:
        raise UserError(f"{keys.where}: layer_types holds {', '.join(map(repr, others))}; supported: 'full_attention'")
    n_heads = keys.size("num_attention_heads")
    theta, scaling = keys.rope(default_theta)
    return ModelConfig(
        family=family,
        vocab_size=keys.size("vocab_size"),
        d_model=keys.size("hidden_size"),
        n_layers=keys.size("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=keys.size("num_key_value_heads", default=n_heads),
        head_dim=keys.size("head_dim", default=head_dim) or keys.head_dim(["hidden_size"], ["num_attention_heads"]),
        d_mlp=keys.size("intermediate_size"),
        norm_eps=keys.take("rms_norm_eps", default=1e-6, kind=float),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=keys.size("max_position_embeddings", default=2048),
        attention=attention,
        qkv_bias=qkv_bias,
        tied_head=keys.take("tie_word_embeddings", default=False, kind=bool),
        **keys.ids(),
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
    """What they spell alike, in the hub's flat spelling."""
    scaling = None
    if config.rope_scaling is not None:
        scaling = {"rope_type": "llama3"} | dataclasses.asdict(config.rope_scaling)
        scaling["original_max_position_embeddings"] = scaling.pop("original_max_positions")
    return shape_keys(config) | {
        "hidden_act": "silu",
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "torch_dtype": "bfloat16",
    }
