"""Torch twins of GPT-2 and of DiffuGPT, which is GPT-2 with every key visible, under the names of its wrapper."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import twins
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from twins import Tape, Twin

SHAPE = {
    "vocab_size": twins.VOCAB, "n_embd": twins.WIDTH, "n_layer": twins.LAYERS, "n_head": 4, "n_inner": 48, "n_positions": 64,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "attn_implementation": "eager",
}  # fmt: skip


def attach(module: nn.Module, tape: Tape) -> None:
    """Hooks at every site."""
    cfg, scale = module.config, twins.layer_scale(module.config.layer_norm_epsilon)
    split = twins.heads(cfg.n_head)
    third = lambda part: lambda x: split(x[..., part * cfg.n_embd : (part + 1) * cfg.n_embd])  # noqa: E731
    for i, layer in enumerate(module.transformer.h):
        tape.read(layer.ln_1, i, resid_pre=None, attn_norm_scale=scale)
        tape.write(layer.ln_1, i, attn_in=None)
        tape.write(layer.attn.c_attn, i, q=third(0), k=third(1), v=third(2))
        tape.pattern(layer.attn, i)
        tape.read(layer.attn.c_proj, i, z=split)
        tape.write(layer.attn.c_proj, i, attn_out=None)
        tape.read(layer.ln_2, i, resid_mid=None, mlp_norm_scale=scale)
        tape.write(layer.ln_2, i, mlp_in=None)
        tape.read(layer.mlp.c_proj, i, mlp_act=None)
        tape.write(layer.mlp.c_proj, i, mlp_out=None)
        tape.write(layer, i, resid_post=None)
    n = len(module.transformer.h)
    tape.read(module.transformer.ln_f, n, final_norm_scale=scale)
    tape.write(module.transformer.ln_f, n, final_norm=None)


def _hub(config: dict[str, Any]) -> dict[str, Any]:
    """The published spelling; its files also say how to summarise and that they could generate."""
    old = {"n_ctx": config["n_positions"], "torch_dtype": config["dtype"], "task_specific_params": {"text-generation": {"max_length": 50}}}
    new = {"dtype", "pad_token_id"} | ({"tie_word_embeddings"} if config["tie_word_embeddings"] else set())
    return {k: v for k, v in config.items() if k not in new} | old


def _gpt2_folder(module: nn.Module, folder: Path, shard: str | None = None) -> None:
    """As on the hub: no prefix, and the causal mask as a buffer of each layer."""
    twins.save(module, folder, shard)
    mask = torch.tril(torch.ones(64, 64))[None, None]
    buffers = {f"h.{i}.attn.bias": mask.clone() for i in range(twins.LAYERS)} | {"h.0.attn.masked_bias": torch.tensor(-1e4)}
    twins.rename_tensors(folder, lambda name: name.removeprefix("transformer."), buffers)
    twins.edit_config(folder, lambda config: _hub(config) | {"pad_token_id": module.config.pad_token_id})


def _diffugpt_folder(module: nn.Module, folder: Path, shard: str | None = None) -> None:
    """As its wrapper saves it: the embedding apart, the rest of the network under ``denoise_model``."""
    names = {"transformer.wte.weight": "embed_tokens.weight"}
    twins.save(module, folder, shard)
    twins.rename_tensors(folder, lambda name: names.get(name, name.replace("transformer.", "denoise_model.")))
    own = {"architectures": ["DiscreteDiffusionModel"], "mask_token_id": twins.MASK, "pad_token_id": module.config.pad_token_id}
    twins.edit_config(folder, lambda config: _hub(config) | own)


def gpt2(folder: Path, **changes: Any) -> Twin:
    """GPT-2."""
    torch.manual_seed(4)
    module = twins.shaken(GPT2LMHeadModel(GPT2Config(**SHAPE | changes)))
    _gpt2_folder(module, folder)
    return Twin(module, twins.recorded(twins.causal, attach), twins.causal, _gpt2_folder, partial(twins.save, module))


def diffugpt(folder: Path, **changes: Any) -> Twin:
    """DiffuGPT; it exists in one spelling only."""
    torch.manual_seed(5)
    module = twins.shaken(GPT2LMHeadModel(GPT2Config(**SHAPE | changes)))
    _diffugpt_folder(module, folder)
    return Twin(module, twins.recorded(twins.bidirectional, attach), twins.bidirectional, _diffugpt_folder)


FAMILIES = {"gpt2": gpt2, "diffugpt": diffugpt}
