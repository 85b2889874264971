"""SDAR 1.7B to 8B, model type ``sdar``: Qwen3's network, block-causal: a token sees its own block and those before.

Blocks of 4 tokens count from position 0. Position i predicts token i.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from ..config import DiffusionSpec, ModelConfig
from . import qwen3
from .reading import Keys, Tensor, checked

MASK_ID, BLOCK_LENGTH = 151669, 4  # of the released models, for files that do not say them

# switches of the training code that the network does not ask
_INERT = ("fuse_cross_entropy", "debug", "micro_forward", "skip_checkpoint", "use_deepep", "ep_size")


def read(keys: Keys) -> tuple[ModelConfig, DiffusionSpec]:
    """Reads a ``config.json`` of model type ``sdar``."""
    for name in _INERT:
        keys.take(name, default=None)
    config = qwen3.read_qwen3_like(keys, "sdar", attention="block_causal")
    config = dataclasses.replace(config, block_length=keys.size("block_size", default=BLOCK_LENGTH))
    return checked(keys, config, DiffusionSpec(mask_id=keys.take("mask_token_id", default=MASK_ID, kind=int), shift=False))


def tensors(config: ModelConfig, names: Collection[str] = frozenset()) -> dict[tuple[str, ...], Tensor]:
    """Our paths -> tensor names."""
    return qwen3.tensors(config)


def write(config: ModelConfig, diffusion: DiffusionSpec | None) -> dict[str, Any]:
    """The ``config.json`` of such a model."""
    kind = {"architectures": ["SDARForCausalLM"], "model_type": "sdar"}
    return qwen3.write(config, None) | kind | {"block_size": config.block_length, "mask_token_id": diffusion.mask_id}
