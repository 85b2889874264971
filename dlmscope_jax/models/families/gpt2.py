"""GPT-2, all sizes: learned positions, layer norms with biases, one tensor for queries, keys and values, tied head.

The file's matrices are ``[in, out]`` as ours are, so none is transposed. The published files name their tensors without the
``transformer.`` that files saved by transformers put before them, and hold the causal mask as a buffer.
"""

from collections.abc import Collection
from typing import Any

from ..config import DiffusionSpec, ModelConfig
from .reading import Fused, Keys, Tensor, checked, id_keys

IGNORED = ("attn.bias", "attn.masked_bias")

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# dropouts, and what belongs to heads that are not loaded
_INERT = """attn_pdrop embd_pdrop resid_pdrop n_ctx n_special predict_special_tokens output_past summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj gradient_checkpointing reorder_and_upcast_attn""".split()


def read(keys: Keys) -> tuple[ModelConfig, None]:
    """Reads a ``config.json`` of model type ``gpt2``.

    ``reorder_and_upcast_attn`` asks for attention scores in float32, which they are here in any case.
    """
    return checked(keys, read_gpt2_like(keys, "gpt2", "causal"), None)


def read_gpt2_like(keys: Keys, family: str, attention: str) -> ModelConfig:
    """What GPT-2 and DiffuGPT spell alike.

    Raises:
      UserError: for a switch that this network does not have.
    """
    keys.expect("add_cross_attention", False)
    keys.expect("scale_attn_by_inverse_layer_idx", False)
    keys.expect("activation_function", *_ACTIVATIONS)
    for name in _INERT:
        keys.take(name, default=None)
    widths, counts = ("n_embd", "hidden_size"), ("n_head", "num_attention_heads")
    d_model, n_heads = keys.size(*widths), keys.size(*counts)
    return ModelConfig(
        family=family,
        vocab_size=keys.size("vocab_size"),
        d_model=d_model,
        n_layers=keys.size("n_layer", "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=keys.head_dim(widths, counts),
        d_mlp=keys.size("n_inner", default=4 * d_model),
        norm_eps=keys.take("layer_norm_epsilon", default=1e-5, kind=float),
        rope_theta=10000.0,
        max_positions=keys.size("n_positions", "max_position_embeddings", default=1024),
        attention=attention,
        qkv_bias=True,
        tied_head=keys.take("tie_word_embeddings", default=True, kind=bool),
        **keys.ids(),
        norm="layer",
        norm_bias=True,
        positions="learned",
        gated=False,
        activation=_ACTIVATIONS[keys.take("activation_function", default="gelu_new")],
        out_bias=True,
        mlp_bias=True,
        attention_scale=None if keys.take("scale_attn_weights", default=True, kind=bool) else 1.0,
    )


def tensors(config: ModelConfig, names: Collection[str] = frozenset()) -> dict[tuple[str, ...], Tensor]:
    """Our paths -> tensor names, with the prefix that these names have."""
    prefix = "transformer." if any(name.startswith("transformer.") for name in names) else ""
    return gpt2_tensors(config, f"{prefix}wte.weight", prefix)


def gpt2_tensors(config: ModelConfig, embedding: str, prefix: str) -> dict[tuple[str, ...], Tensor]:
    """The tensors of GPT-2's layout: the name of the embedding, and what stands before all other names."""
    block = prefix + "h.{layer}"
    table: dict[tuple[str, ...], Tensor] = {
        ("embed",): Tensor(embedding),
        ("positions",): Tensor(f"{prefix}wpe.weight"),
        ("final_norm",): Tensor(f"{prefix}ln_f.weight"),
        ("final_norm_bias",): Tensor(f"{prefix}ln_f.bias"),
    }
    for part, ours in enumerate("qkv"):
        fused = Fused(part, 3, config.n_heads * config.head_dim)
        table["blocks", ours] = Tensor(f"{block}.attn.c_attn.weight", fused=fused)
        table["blocks", f"{ours}_bias"] = Tensor(f"{block}.attn.c_attn.bias", fused=fused)
    for ours, theirs in {"attn_norm": "ln_1", "o": "attn.c_proj", "mlp_norm": "ln_2", "up": "mlp.c_fc", "down": "mlp.c_proj"}.items():
        table["blocks", ours] = Tensor(f"{block}.{theirs}.weight")
        table["blocks", f"{ours}_bias"] = Tensor(f"{block}.{theirs}.bias")
    return table if config.tied_head else table | {("head",): Tensor("lm_head.weight")}


def write(config: ModelConfig, diffusion: DiffusionSpec | None) -> dict[str, Any]:
    """The ``config.json`` of such a model."""
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": names[config.activation],
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_mlp,
        "n_positions": config.max_positions,
        "n_ctx": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": config.attention_scale is None,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_head,
        **id_keys(config),
    }
