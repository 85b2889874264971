"""Dream 7B, Dream-Coder, DiffuCoder, model type ``Dream``: Qwen2's network, bidirectional; position i predicts token i + 1."""

from collections.abc import Collection
from typing import Any

from ..config import DiffusionSpec, ModelConfig
from .llama import read_llama_like, write_llama_like
from .reading import Keys, Tensor, checked, llama_tensors


def read(keys: Keys) -> tuple[ModelConfig, DiffusionSpec]:
    """Reads a ``config.json`` of model type ``Dream``; the mask token stands there, not in ``generation_config.json``."""
    keys.expect("use_mrope", False)
    mask_id = keys.take("mask_token_id", kind=int)
    config = read_llama_like(keys, "dream", qkv_bias=True, default_theta=10000.0, attention="bidirectional")
    return checked(keys, config, DiffusionSpec(mask_id=mask_id, shift=True))


def tensors(config: ModelConfig, names: Collection[str] = frozenset()) -> dict[tuple[str, ...], Tensor]:
    """Our paths -> tensor names."""
    return llama_tensors(config.qkv_bias, config.tied_head)


def write(config: ModelConfig, diffusion: DiffusionSpec | None) -> dict[str, Any]:
    """The ``config.json`` of such a model."""
    kind = {"architectures": ["DreamModel"], "model_type": "Dream", "use_sliding_window": False, "mask_token_id": diffusion.mask_id}
    return kind | write_llama_like(config)
