"""Tiny-A2D, model types ``a2d-qwen3`` and ``a2d-qwen2``: Qwen networks trained on as diffusion models, every key visible.

Their ``config.json`` is the original network's under another model type. The mask token was added to the tokenizer as its
next id and does not stand in the config: 151669 after Qwen3's tokens, 151665 after Qwen2.5's. Position i predicts token i,
the training code's default. The block-wise variants (``...-bd3lm-...``) have the same model type: whoever runs one of them
sets ``attention`` and ``block_length`` of the loaded configuration to the blocks that it was trained with.
"""

from collections.abc import Collection
from typing import Any

from ..config import DiffusionSpec, ModelConfig
from . import qwen2, qwen3
from .llama import read_llama_like
from .reading import Keys, Tensor, checked

MASK_ID = {"a2d-qwen3": 151669, "a2d-qwen2": 151665}


def read(keys: Keys) -> tuple[ModelConfig, DiffusionSpec]:
    """Reads a ``config.json`` of model type ``a2d-qwen3`` or ``a2d-qwen2``."""
    family = keys.take("model_type").lower()
    if family == "a2d-qwen3":
        config = qwen3.read_qwen3_like(keys, family, attention="bidirectional")
    else:
        config = read_llama_like(keys, family, qkv_bias=True, default_theta=10000.0, attention="bidirectional")
    return checked(keys, config, DiffusionSpec(mask_id=keys.take("mask_token_id", default=MASK_ID[family], kind=int), shift=False))


def tensors(config: ModelConfig, names: Collection[str] = frozenset()) -> dict[tuple[str, ...], Tensor]:
    """Our paths -> tensor names."""
    return (qwen3 if config.qk_norm else qwen2).tensors(config)


def write(config: ModelConfig, diffusion: DiffusionSpec | None) -> dict[str, Any]:
    """The ``config.json`` of such a model; it also says the mask token."""
    name = "A2DQwen3LMHeadModel" if config.qk_norm else "A2DQwen2LMHeadModel"
    kind = {"architectures": [name], "model_type": config.family, "mask_token_id": diffusion.mask_id}
    return (qwen3 if config.qk_norm else qwen2).write(config, None) | kind
