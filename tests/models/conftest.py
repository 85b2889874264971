"""Tiny random models of each family, in the layouts in which the originals are published."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from dlmscope_jax.models import DiffusionSpec, ModelConfig, Transformer, init_params

TINY = ModelConfig(
    family="llama", vocab_size=97, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, d_mlp=48, norm_eps=1e-5, rope_theta=500.0,
    max_positions=64, attention="causal", bos_id=0, eos_id=1, pad_id=2,
)  # fmt: skip


def tiny(family: str, dtype=jnp.float32) -> Transformer:
    """A small model of a family."""
    if family == "llama":
        return Transformer(TINY, None, dtype)
    if family == "qwen2":
        return Transformer(dataclasses.replace(TINY, family="qwen2", qkv_bias=True, tied_head=True), None, dtype)
    bidirectional = dataclasses.replace(TINY, attention="bidirectional")
    if family == "dream":
        return Transformer(dataclasses.replace(bidirectional, family="dream", qkv_bias=True), DiffusionSpec(3, shift=True), dtype)
    config = dataclasses.replace(bidirectional, family="llada", n_kv_heads=4, rope_float32=True)
    return Transformer(config, DiffusionSpec(3, shift=False), dtype)


def random_params(model: Transformer, seed: int = 0) -> dict:
    """Parameters with norms and biases away from one and zero, so that a forgotten one is noticed."""
    params = init_params(model, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(tree, [x + 0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


@pytest.fixture(params=["llama", "qwen2", "dream", "llada"])
def family(request) -> str:
    return request.param


@pytest.fixture
def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(7), (2, 11), 4, 97)


@pytest.fixture
def tiny_model():
    """``family -> (model, params)``."""
    return lambda family: (tiny(family), random_params(tiny(family)))


class SineDictionary:
    """A dictionary with a sine in its encoder, an operation that no language model here contains."""

    def encode(self, params, x):
        values = jnp.sin(jnp.einsum("...d,nd->...n", x, params["W"]))
        return SimpleNamespace(values=values, latent=lambda i: jnp.take(values, i, axis=-1))

    def decode(self, params, codes, x=None):
        return jnp.einsum("...n,nd->...d", codes.values, params["W"])

    def direction(self, params, i):
        return params["W"][i]


@pytest.fixture
def dictionary():
    """A static description and its parameters, 6 latents of width 32."""
    return SineDictionary(), {"W": jax.random.normal(jax.random.key(11), (6, 32)) / 6}


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


@pytest.fixture
def torch_twin():
    """Torch twins of the tiny models, written to disk in the layout of the family: ``torch_twin(family, folder)``."""
    return make_torch_twin


def make_torch_twin(family: str, folder: Path, **changes):
    """A random torch model saved to ``folder`` as the family publishes it.

    Returns:
      The torch model, and whether it needs an explicit all-visible mask to be bidirectional.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

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
