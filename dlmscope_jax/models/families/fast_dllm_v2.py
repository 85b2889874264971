"""Fast-dLLM v2 1.5B and 7B, model type ``Fast_dLLM_Qwen``: Qwen2.5's network, block-causal; position i predicts token i + 1.

A token sees its own block of 32 and those before; blocks count from position 0. The sub-blocks of 8 belong to the sampler.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from ..config import DiffusionSpec, ModelConfig
from . import qwen2
from .llama import read_llama_like
from .reading import Keys, Tensor, checked

MASK_ID, BLOCK_LENGTH = 151665, 32  # of the released models, for files that do not say them


def read(keys: Keys) -> tuple[ModelConfig, DiffusionSpec]:
    """Reads a ``config.json`` of model type ``Fast_dLLM_Qwen``."""
    config = read_llama_like(keys, "fast_dllm_qwen", qkv_bias=True, default_theta=10000.0, attention="block_causal")
    config = dataclasses.replace(config, block_length=keys.size("bd_size", default=BLOCK_LENGTH))
    return checked(keys, config, DiffusionSpec(mask_id=keys.take("mask_token_id", default=MASK_ID, kind=int), shift=True))


def tensors(config: ModelConfig, names: Collection[str] = frozenset()) -> dict[tuple[str, ...], Tensor]:
    """Our paths -> tensor names."""
    return qwen2.tensors(config)


def write(config: ModelConfig, diffusion: DiffusionSpec | None) -> dict[str, Any]:
    """The ``config.json`` of such a model."""
    kind = {"architectures": ["Fast_dLLM_QwenForCausalLM"], "model_type": "Fast_dLLM_Qwen"}
    return qwen2.write(config, None) | kind | {"bd_size": config.block_length, "mask_token_id": diffusion.mask_id}
