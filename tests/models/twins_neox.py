"""Torch twins of GPT-NeoX and Pythia: parallel and serial residuals, partial rotation, queries, keys and values head by head."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import twins
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from twins import Tape, Twin

SHAPE = {
    "vocab_size": twins.VOCAB, "hidden_size": twins.WIDTH, "num_hidden_layers": twins.LAYERS, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    "attn_implementation": "eager", "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
}  # fmt: skip


def attach(module: nn.Module, tape: Tape) -> None:
    """Hooks at every site; a parallel model has no residual stream between attention and MLP."""
    cfg, scale = module.config, twins.layer_scale(module.config.layer_norm_eps)
    split = twins.heads(cfg.num_attention_heads)
    third = lambda part: lambda x: split(x).chunk(3, dim=-1)[part]  # noqa: E731
    middle = {} if cfg.use_parallel_residual else {"resid_mid": None}
    for i, layer in enumerate(module.gpt_neox.layers):
        tape.read(layer.input_layernorm, i, resid_pre=None, attn_norm_scale=scale)
        tape.write(layer.input_layernorm, i, attn_in=None)
        tape.write(layer.attention.query_key_value, i, q=third(0), k=third(1), v=third(2))
        tape.pattern(layer.attention, i)
        tape.read(layer.attention.dense, i, z=split)
        tape.write(layer.attention.dense, i, attn_out=None)
        tape.read(layer.post_attention_layernorm, i, mlp_norm_scale=scale, **middle)
        tape.write(layer.post_attention_layernorm, i, mlp_in=None)
        tape.read(layer.mlp.dense_4h_to_h, i, mlp_act=None)
        tape.write(layer.mlp.dense_4h_to_h, i, mlp_out=None)
        tape.write(layer, i, resid_post=None)
    n = len(module.gpt_neox.layers)
    tape.read(module.gpt_neox.final_layer_norm, n, final_norm_scale=scale)
    tape.write(module.gpt_neox.final_layer_norm, n, final_norm=None)


def _hub_folder(module: nn.Module, folder: Path, shard: str | None = None) -> None:
    """As on the hub: flat rotary keys; masks and rotary frequencies among the tensors."""

    def flat(config: dict[str, Any]) -> dict[str, Any]:
        rope = config.pop("rope_parameters")
        old = {"rotary_pct": rope["partial_rotary_factor"], "rotary_emb_base": int(rope["rope_theta"]), "torch_dtype": config.pop("dtype")}
        return config | old

    twins.save(module, folder, shard)
    attention = "gpt_neox.layers.{}.attention"
    buffers = {attention.format(i) + ".bias": torch.tril(torch.ones(64, 64, dtype=torch.bool))[None, None] for i in range(twins.LAYERS)}
    buffers |= {attention.format(i) + ".masked_bias": torch.tensor(-1e9) for i in range(twins.LAYERS)}
    buffers |= {attention.format(i) + ".rotary_emb.inv_freq": torch.ones(2) for i in range(twins.LAYERS)}
    twins.rename_tensors(folder, lambda name: name.replace("lm_head", "embed_out"), buffers)
    twins.edit_config(folder, flat)


def _nested_folder(module: nn.Module, folder: Path) -> None:
    """As a module of transformers 5 names its tensors, whatever it writes: the head is ``lm_head``."""
    twins.save(module, folder)
    twins.rename_tensors(folder, lambda name: name.replace("embed_out", "lm_head"))


def gpt_neox(folder: Path, **changes: Any) -> Twin:
    """GPT-NeoX."""
    torch.manual_seed(6)
    module = twins.shaken(GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE | changes)))
    _hub_folder(module, folder)
    return Twin(module, twins.recorded(twins.causal, attach), twins.causal, _hub_folder, partial(_nested_folder, module))


FAMILIES = {"gpt_neox": gpt_neox}
