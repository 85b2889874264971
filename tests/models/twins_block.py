"""Torch twins of the block-causal families: SDAR (Qwen3) and Fast-dLLM v2 (Qwen2), under an explicit mask of blocks."""

from pathlib import Path
from typing import Any

import numpy as np
import twins
from twins import Twin
from twins_qwen3 import random_qwen2, random_qwen3, seeing, twin_of

BLOCK = 4


def blocks(length: int) -> np.ndarray:
    """[T, T]: a query sees the keys of its own block and of those before."""
    block = np.arange(length) // BLOCK
    return block[:, None] >= block[None, :]


block_causal = seeing(blocks)


def sdar(folder: Path, **changes: Any) -> Twin:
    """SDAR: Qwen3's network and layout."""
    own = {
        "model_type": "sdar", "architectures": ["SDARForCausalLM"], "block_size": BLOCK, "mask_token_id": twins.MASK,
        "fuse_cross_entropy": True,
    }  # fmt: skip
    return twin_of(random_qwen3(20, **{"tie_word_embeddings": False} | changes), folder, block_causal, **own)


def fast_dllm(folder: Path, **changes: Any) -> Twin:
    """Fast-dLLM v2: Qwen2's network and layout, tied as its smaller model is."""
    own = {"model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"], "bd_size": BLOCK, "mask_token_id": twins.MASK}
    return twin_of(random_qwen2(21, **{"tie_word_embeddings": True} | changes), folder, block_causal, **own)


FAMILIES = {"sdar": sdar, "fast_dllm_qwen": fast_dllm}
