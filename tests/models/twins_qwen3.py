"""Torch twins with Qwen3's network: Qwen3 itself and Tiny-A2D; and Tiny-A2D and iLLaDA with Qwen2's and Llama's."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import twins
import twins_llama
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from twins import Tape, Twin

SHAPE = twins_llama.SHAPE
HEAD_DIM = 16  # wider than WIDTH / 4


def attach(module: nn.Module, tape: Tape) -> None:
    """Hooks at every site of a Llama-like model, and at the norms of queries and keys where it has them."""
    twins_llama.attach(module, tape)
    scale = twins.rms_scale(module.config.rms_norm_eps)
    for i, layer in enumerate(module.model.layers):
        if hasattr(layer.self_attn, "q_norm"):
            tape.read(layer.self_attn.q_norm, i, q_norm_scale=scale)
            tape.read(layer.self_attn.k_norm, i, k_norm_scale=scale)


def seeing(rule: Callable[[int], np.ndarray]) -> Callable[..., torch.Tensor]:
    """A forward of transformers in which a query sees a key where ``rule(T)`` [T, T] says so."""

    def forward(module: nn.Module, tokens: np.ndarray, keep: np.ndarray | None = None) -> torch.Tensor:
        mask = twins.additive_mask(module, tokens, keep, rule(tokens.shape[1]))
        return module(torch.tensor(tokens).long(), attention_mask=mask, use_cache=False).logits

    return forward


def twin_of(module: nn.Module, folder: Path, forward: Callable[..., torch.Tensor], **own: Any) -> Twin:
    """A twin whose folder is transformers' own but for keys of ``config.json``; ``layer_types`` stands in new files only."""

    def save(module: nn.Module, folder: Path, shard: str | None = None, nested: bool = False) -> None:
        twins.save(module, folder, shard)
        flat = lambda config: {k: v for k, v in twins.flat_rope(config).items() if k != "layer_types"}  # noqa: E731
        twins.edit_config(folder, lambda config: (config if nested else flat(config)) | own)

    save(module, folder)
    return Twin(module, twins.recorded(forward, attach), forward, save, partial(save, module, nested=True))


def random_qwen3(seed: int, **changes: Any) -> nn.Module:
    """A random Qwen3 with heads wider than ``D / N``."""
    torch.manual_seed(seed)
    return twins.shaken(Qwen3ForCausalLM(Qwen3Config(**SHAPE | {"head_dim": HEAD_DIM} | changes)))


def random_qwen2(seed: int, **changes: Any) -> nn.Module:
    """A random Qwen2."""
    torch.manual_seed(seed)
    return twins.shaken(Qwen2ForCausalLM(Qwen2Config(**SHAPE | changes)))


def qwen3(folder: Path, **changes: Any) -> Twin:
    """Qwen3, with a tied head; a window stands in the file and is switched off."""
    return twin_of(random_qwen3(10, **{"tie_word_embeddings": True} | changes), folder, twins.causal, sliding_window=4)


def a2d_qwen3(folder: Path, **changes: Any) -> Twin:
    """Tiny-A2D: Qwen3 with every key visible."""
    own = {"model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"], "mask_token_id": twins.MASK}
    return twin_of(random_qwen3(11, **{"tie_word_embeddings": False} | changes), folder, twins.bidirectional, **own)


def a2d_qwen2(folder: Path, **changes: Any) -> Twin:
    """Tiny-A2D: Qwen2 with every key visible."""
    own = {"model_type": "a2d-qwen2", "architectures": ["A2DQwen2LMHeadModel"], "mask_token_id": twins.MASK}
    return twin_of(random_qwen2(12, **{"tie_word_embeddings": True} | changes), folder, twins.bidirectional, **own)


def illada(folder: Path, **changes: Any) -> Twin:
    """iLLaDA: Llama with a tied head and every key visible."""
    torch.manual_seed(13)
    module = twins.shaken(LlamaForCausalLM(LlamaConfig(**SHAPE | {"tie_word_embeddings": True} | changes)))
    own = {"model_type": "illada", "architectures": ["ILLaDAForCausalLM"], "mask_token_id": twins.MASK, "layer_norm_eps": None}
    return twin_of(module, folder, twins.bidirectional, **own)


FAMILIES = {"qwen3": qwen3, "a2d-qwen3": a2d_qwen3, "a2d-qwen2": a2d_qwen2, "illada": illada}
