"""LLaDA 8B and 1.5: bidirectional, unshifted, rotation in float32, and the layout of its OLMo ancestors.

``blocks.N.ff_out`` is the MLP's down projection and ``transformer.ff_out`` the output head: the same leaf name twice.
"""

from collections.abc import Collection
from typing import Any

from dlmscope_jax.errors import UserError

from ..config import DiffusionSpec, ModelConfig
from .reading import Keys, Tensor, block_tensors, checked, id_keys

MASK_ID = 126336  # of the released models, for files that do not say it

# switches that the released models do not use; a model that does computes something else
_FIXED = {
    "activation_type": "silu", "block_type": "llama", "block_group_size": 1, "layer_norm_type": "rms", "layer_norm_with_affine": True,
    "attention_layer_norm": False, "attention_layer_norm_with_affine": True, "include_bias": False, "include_qkv_bias": False,
    "bias_for_layer_norm": False, "rope": True, "alibi": False, "input_emb_norm": False, "scale_logits": False,
    "multi_query_attention": None, "alibi_bias_max": 8.0,
}  # fmt: skip
# those of them for which the original class takes something else where a file leaves them out
_MUST_BE_SAID = ("activation_type", "block_type", "layer_norm_type", "rope")


def read(keys: Keys) -> tuple[ModelConfig, DiffusionSpec]:
    """Reads a ``config.json`` of model type ``llada``; a missing key means what the original class takes for it.

    Raises:
      UserError: for a switch of that class that the released models do not use, set or left to its default.
    """
    for name in _MUST_BE_SAID:
        keys.take(name)
    for name, value in _FIXED.items():
        if name not in ("attention_layer_norm_with_affine", "alibi_bias_max"):
            keys.expect(name, value)
        else:
            keys.take(name, default=None)  # belongs to a switch that is off
    d_model, n_heads, head_dim = keys.size("d_model"), keys.size("n_heads"), keys.head_dim(["d_model"], ["n_heads"])
    vocab, embedding = keys.size("vocab_size"), keys.take("embedding_size", default=None)
    if embedding not in (None, vocab):
        raise UserError(f"{keys.where}: embedding_size {embedding} differs from vocab_size {vocab}")
    config = ModelConfig(
        family="llada",
        vocab_size=vocab,
        d_model=d_model,
        n_layers=keys.size("n_layers", "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=keys.size("n_kv_heads", default=n_heads),
        head_dim=head_dim,
        d_mlp=keys.size("mlp_hidden_size", default=keys.size("mlp_ratio", default=4) * d_model),
        norm_eps=keys.take("rms_norm_eps", default=1e-5, kind=float),
        rope_theta=float(keys.size("rope_theta", default=10000.0, kind=float)),
        max_positions=keys.size("max_sequence_length", default=1024),
        attention="bidirectional",
        rope_float32=keys.take("rope_full_precision", default=True, kind=bool),
        tied_head=keys.take("weight_tying", kind=bool),
        **keys.ids(),
    )
    return checked(keys, config, DiffusionSpec(mask_id=keys.take("mask_token_id", default=MASK_ID, kind=int), shift=False))


def tensors(config: ModelConfig, names: Collection[str] = frozenset()) -> dict[tuple[str, ...], Tensor]:
    """Our paths -> tensor names."""
    names = {
        "attn_norm": "attn_norm.weight", "q": "q_proj.weight", "k": "k_proj.weight", "v": "v_proj.weight", "o": "attn_out.weight",
        "mlp_norm": "ff_norm.weight", "gate": "ff_proj.weight", "up": "up_proj.weight", "down": "ff_out.weight",
    }  # fmt: skip
    table = block_tensors("model.transformer.blocks.{layer}", names)
    table |= {("embed",): Tensor("model.transformer.wte.weight"), ("final_norm",): Tensor("model.transformer.ln_f.weight")}
    return table if config.tied_head else table | {("head",): Tensor("model.transformer.ff_out.weight")}


def write(config: ModelConfig, diffusion: DiffusionSpec | None) -> dict[str, Any]:
    """The ``config.json`` of such a model."""
    return _FIXED | {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": config.d_model,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "mlp_hidden_size": config.d_mlp,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_full_precision": config.rope_float32,
        "max_sequence_length": config.max_positions,
        "vocab_size": config.vocab_size,
        "embedding_size": config.vocab_size,
        "weight_tying": config.tied_head,
        "mask_token_id": diffusion.mask_id,
        **id_keys(config),
        "torch_dtype": "bfloat16",
    }
