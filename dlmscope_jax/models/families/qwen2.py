"""Qwen2 and Qwen2.5: Llama's network with biases on the query, key and value projections."""

from collections.abc import Collection
from typing import Any

from ..config import DiffusionSpec, ModelConfig
from .llama import read_llama_like, write_llama_like
from .reading import Keys, Tensor, checked, llama_tensors


def read(keys: Keys) -> tuple[ModelConfig, None]:
    """Reads a ``config.json`` of model type ``qwen2``; its window keys do nothing while ``use_sliding_window`` is false."""
    return checked(keys, read_llama_like(keys, "qwen2", qkv_bias=True, default_theta=10000.0), None)


def tensors(config: ModelConfig, names: Collection[str] = frozenset()) -> dict[tuple[str, ...], Tensor]:
    """Our paths -> tensor names."""
    return llama_tensors(config.qkv_bias, config.tied_head)


def write(config: ModelConfig, diffusion: DiffusionSpec | None) -> dict[str, Any]:
    """The ``config.json`` of such a model."""
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False} | write_llama_like(config)
