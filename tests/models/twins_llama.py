"""Torch twins of the Llama-like families: Llama, Qwen2, Dream (Qwen2 with every key visible), LLaDA (Llama likewise, renamed)."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
import twins
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from twins import Tape, Twin

SHAPE = {
    "vocab_size": twins.VOCAB, "hidden_size": twins.WIDTH, "num_hidden_layers": twins.LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "attn_implementation": "eager",
}  # fmt: skip

# Llama 3.1's stretching, with an original context short enough for the tiny frequencies to fall on both sides of it
STRETCHED = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip

LLADA_NAMES = [
    (r"model\.layers\.(\d+)\.input_layernorm", r"model.transformer.blocks.\1.attn_norm"),
    (r"model\.layers\.(\d+)\.self_attn\.o_proj", r"model.transformer.blocks.\1.attn_out"),
    (r"model\.layers\.(\d+)\.self_attn\.(q|k|v)_proj", r"model.transformer.blocks.\1.\2_proj"),
    (r"model\.layers\.(\d+)\.post_attention_layernorm", r"model.transformer.blocks.\1.ff_norm"),
    (r"model\.layers\.(\d+)\.mlp\.gate_proj", r"model.transformer.blocks.\1.ff_proj"),
    (r"model\.layers\.(\d+)\.mlp\.up_proj", r"model.transformer.blocks.\1.up_proj"),
    (r"model\.layers\.(\d+)\.mlp\.down_proj", r"model.transformer.blocks.\1.ff_out"),
    (r"model\.embed_tokens", "model.transformer.wte"),
    (r"model\.norm", "model.transformer.ln_f"),
    (r"lm_head", "model.transformer.ff_out"),
]


def attach(module: nn.Module, tape: Tape) -> None:
    """Hooks at every site of a Llama-like model."""
    attach_inner(module, tape)
    scale = twins.rms_scale(module.config.rms_norm_eps)
    for i, layer in enumerate(module.model.layers):
        tape.write(layer.self_attn.o_proj, i, attn_out=None)
        tape.read(layer.post_attention_layernorm, i, resid_mid=None, mlp_norm_scale=scale)
        tape.write(layer.post_attention_layernorm, i, mlp_in=None)
        tape.write(layer.mlp, i, mlp_out=None)


def attach_inner(module: nn.Module, tape: Tape) -> None:
    """Hooks at the sites for which it does not matter what happens to the outputs of attention and MLP before they are added."""
    cfg, scale = module.config, twins.rms_scale(module.config.rms_norm_eps)
    queries, keys = twins.heads(cfg.num_attention_heads), twins.heads(cfg.num_key_value_heads)
    for i, layer in enumerate(module.model.layers):
        attention = layer.self_attn
        tape.read(layer.input_layernorm, i, resid_pre=None, attn_norm_scale=scale)
        tape.write(layer.input_layernorm, i, attn_in=None)
        tape.write(attention.q_proj, i, q=queries)
        tape.write(attention.k_proj, i, k=keys)
        tape.write(attention.v_proj, i, v=keys)
        tape.pattern(attention, i)
        tape.read(attention.o_proj, i, z=queries)
        tape.read(layer.mlp.down_proj, i, mlp_act=None)
        tape.write(layer, i, resid_post=None)
    n = len(module.model.layers)
    tape.read(module.model.norm, n, final_norm_scale=scale)
    tape.write(module.model.norm, n, final_norm=None)


def _llama_folder(module: nn.Module, folder: Path, shard: str | None = None) -> None:
    twins.save(module, folder, shard)
    twins.edit_config(folder, twins.flat_rope)


def _dream_folder(module: nn.Module, folder: Path, shard: str | None = None, nested: bool = False) -> None:
    twins.save(module, folder, shard)
    own = {"model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": twins.MASK}
    twins.edit_config(folder, lambda config: (config if nested else twins.flat_rope(config)) | own)


def _llada_folder(module: nn.Module, folder: Path, shard: str | None = None) -> None:
    def renamed(name: str) -> str:
        for pattern, new in LLADA_NAMES:
            name = re.sub(pattern, new, name)
        return name

    twins.save(module, folder, shard)
    twins.rename_tensors(folder, renamed)
    config: dict[str, Any] = {
        "model_type": "llada", "d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 48, "mlp_ratio": 4,
        "activation_type": "silu", "block_type": "llama", "layer_norm_type": "rms", "rms_norm_eps": 1e-5, "rope": True,
        "rope_theta": 500.0, "rope_full_precision": True, "weight_tying": False, "vocab_size": 97, "embedding_size": 97,
        "max_sequence_length": 64, "mask_token_id": twins.MASK, "eos_token_id": 1, "pad_token_id": 1, "include_bias": False,
        "flash_attention": False,
    }  # fmt: skip
    twins.edit_config(folder, lambda _: config)


def llama(folder: Path, **changes: Any) -> Twin:
    """Llama."""
    torch.manual_seed(0)
    module = twins.shaken(LlamaForCausalLM(LlamaConfig(**SHAPE | {"tie_word_embeddings": False} | changes)))
    _llama_folder(module, folder)
    return Twin(module, twins.recorded(twins.causal, attach), twins.causal, _llama_folder, partial(twins.save, module))


def qwen2(folder: Path, **changes: Any) -> Twin:
    """Qwen2, with a tied head."""
    torch.manual_seed(1)
    module = twins.shaken(Qwen2ForCausalLM(Qwen2Config(**SHAPE | {"tie_word_embeddings": True} | changes)))
    _llama_folder(module, folder)
    return Twin(module, twins.recorded(twins.causal, attach), twins.causal, _llama_folder, partial(twins.save, module))


def dream(folder: Path, **changes: Any) -> Twin:
    """Dream: Qwen2 with every key visible."""
    torch.manual_seed(2)
    module = twins.shaken(Qwen2ForCausalLM(Qwen2Config(**SHAPE | {"tie_word_embeddings": False} | changes)))
    _dream_folder(module, folder)
    return Twin(
        module, twins.recorded(twins.bidirectional, attach), twins.bidirectional, _dream_folder, partial(_dream_folder, module, nested=True)
    )


def llada(folder: Path, **changes: Any) -> Twin:
    """LLaDA: Llama with every key visible, under LLaDA's names; it exists in one spelling only."""
    torch.manual_seed(3)
    module = twins.shaken(LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_key_value_heads": 4, "tie_word_embeddings": False} | changes)))
    _llada_folder(module, folder)
    return Twin(module, twins.recorded(twins.bidirectional, attach), twins.bidirectional, _llada_folder)


FAMILIES = {"llama": llama, "qwen2": qwen2, "dream": dream, "llada": llada}
