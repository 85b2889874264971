"""Torch twin of Gemma-2, with a window shorter than the texts and caps that bite."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import twins
import twins_llama
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM
from twins import Tape, Twin

GEMMA = {
    "head_dim": 16, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "sliding_window": 4,
}  # fmt: skip


def attach(module: nn.Module, tape: Tape) -> None:
    """Hooks at every site; what is added to the residual stream is the output of the second norm of each half."""
    twins_llama.attach_inner(module, tape)
    scale = twins.rms_scale(module.config.rms_norm_eps)
    for i, layer in enumerate(module.model.layers):
        tape.write(layer.self_attn.o_proj, i, attn_raw=None)
        tape.read(layer.post_attention_layernorm, i, attn_post_norm_scale=scale)
        tape.write(layer.post_attention_layernorm, i, attn_out=None)
        tape.read(layer.pre_feedforward_layernorm, i, resid_mid=None, mlp_norm_scale=scale)
        tape.write(layer.pre_feedforward_layernorm, i, mlp_in=None)
        tape.write(layer.mlp, i, mlp_raw=None)
        tape.read(layer.post_feedforward_layernorm, i, mlp_post_norm_scale=scale)
        tape.write(layer.post_feedforward_layernorm, i, mlp_out=None)


def _hub_keys(config: dict[str, Any]) -> dict[str, Any]:
    """As published: which layers have the window, and that the head is tied, stands in no key."""
    flat = {k: v for k, v in twins.flat_rope(config).items() if k not in ("layer_types", "tie_word_embeddings")}
    return flat | {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}


def _folder(module: nn.Module, folder: Path, shard: str | None = None) -> None:
    twins.save(module, folder, shard)
    twins.edit_config(folder, _hub_keys)


def gemma2(folder: Path, **changes: Any) -> Twin:
    """Gemma-2."""
    torch.manual_seed(30)
    module = twins.shaken(Gemma2ForCausalLM(Gemma2Config(**twins_llama.SHAPE | GEMMA | changes)))
    _folder(module, folder)
    return Twin(module, twins.recorded(twins.causal, attach), twins.causal, _folder, partial(twins.save, module))


FAMILIES = {"gemma2": gemma2}
