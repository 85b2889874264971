"""Torch twins of the tiny models, written to disk in the layout of the family."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

LLADA = [
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


def torch_twin(family: str, folder: Path, **changes):
    """A random torch model saved to ``folder`` as the family publishes it.

    Returns:
      The torch model, and whether it needs an explicit all-visible mask to be bidirectional.
    """
    shape = {
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
        "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "attn_implementation": "eager",
    } | changes  # fmt: skip
    torch.manual_seed(0)
    if family in ("llama", "llada"):
        if family == "llada":
            shape["num_key_value_heads"] = 4
        twin = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
    else:
        twin = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=family == "qwen2"))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    twin.eval()
    twin.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if family == "dream":
        config |= {"model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": 3}
    if family == "llada":
        tensors = load_file(folder / "model.safetensors")
        for pattern, name in LLADA:
            tensors = {re.sub(pattern, name, k): v for k, v in tensors.items()}
        save_file(tensors, folder / "model.safetensors")
        config = {
            "model_type": "llada", "d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 48, "mlp_ratio": 4,
            "activation_type": "silu", "block_type": "llama", "layer_norm_type": "rms", "rms_norm_eps": 1e-5, "rope": True,
            "rope_theta": 500.0, "rope_full_precision": True, "weight_tying": False, "vocab_size": 97, "embedding_size": 97,
            "max_sequence_length": 64,
            "mask_token_id": 3, "eos_token_id": 1, "pad_token_id": 1, "include_bias": False, "flash_attention": False,
        }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return twin, family in ("dream", "llada")
