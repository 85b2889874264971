"""Qwen3, model type ``qwen3``: Llama's network with a norm on each query and key head; heads may be wider than ``D / N``."""

import dataclasses
from collections.abc import Collection
from typing import Any

from ..config import DiffusionSpec, ModelConfig
from .llama import read_llama_like, write_llama_like
from .reading import Keys, Tensor, checked, llama_tensors


def read(keys: Keys) -> tuple[ModelConfig, None]:
    """Reads a ``config.json`` of model type ``qwen3``; its window keys do nothing while ``use_sliding_window`` is false."""
    return checked(keys, read_qwen3_like(keys, "qwen3"), None)


def read_qwen3_like(keys: Keys, family: str, attention: str = "causal") -> ModelConfig:
    """What Qwen3 and the diffusion models made from it spell alike; a missing width of a head is the published class's.

    Raises:
      UserError: for biases or windows, which these networks do not have.
    """
    keys.expect("attention_bias", False)
    config = read_llama_like(keys, family, qkv_bias=False, default_theta=10000.0, attention=attention, head_dim=128)
    return dataclasses.replace(config, qk_norm=True)


def tensors(config: ModelConfig, names: Collection[str] = frozenset()) -> dict[tuple[str, ...], Tensor]:
    """Our paths -> tensor names."""
    norms = {("blocks", f"{p}_norm"): Tensor(f"model.layers.{{layer}}.self_attn.{p}_norm.weight") for p in "qk"}
    return llama_tensors(config.qkv_bias, config.tied_head) | norms


def write(config: ModelConfig, diffusion: DiffusionSpec | None) -> dict[str, Any]:
    """The ``config.json`` of such a model."""
    kind = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "use_sliding_window": False}
    return kind | write_llama_like(config)
