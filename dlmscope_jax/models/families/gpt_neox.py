"""GPT-NeoX and Pythia, model type ``gpt_neox``: attention and MLP side by side, rotation of the first part of each head.

The tensor of queries, keys and values is laid out head by head. The head is ``embed_out`` on disk, whatever its module is
called; both names are read. The published files hold causal masks and rotary frequencies as buffers.
"""

from collections.abc import Collection
from typing import Any

from dlmscope_jax.errors import UserError

from ..config import DiffusionSpec, ModelConfig
from .reading import Fused, Keys, Tensor, checked, shape_keys

IGNORED = ("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq")

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}


def read(keys: Keys) -> tuple[ModelConfig, None]:
    """Reads a ``config.json`` of model type ``gpt_neox``, in the hub's spelling or that of transformers 5.

    Raises:
      UserError: for an activation or a rotary scaling that this network does not have, or heads that do not divide the width.
    """
    keys.expect("hidden_act", *_ACTIVATIONS)
    for inert in ("classifier_dropout", "hidden_dropout"):
        keys.take(inert, default=None)
    n_heads, head_dim = keys.size("num_attention_heads"), keys.head_dim(["hidden_size"], ["num_attention_heads"])
    theta, scaling = keys.rope(keys.size("rotary_emb_base", default=10000.0, kind=float), partial=True)
    if scaling is not None:
        raise UserError(f"{keys.where}: rotary scaling is not supported in a gpt_neox model")
    share = keys.agreed(["rotary_pct", "partial_rotary_factor"], keys.nested_rope(), "partial_rotary_factor", 0.25)
    bias = keys.take("attention_bias", default=True, kind=bool)
    config = ModelConfig(
        family="gpt_neox",
        vocab_size=keys.size("vocab_size"),
        d_model=keys.size("hidden_size"),
        n_layers=keys.size("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=head_dim,
        d_mlp=keys.size("intermediate_size"),
        norm_eps=keys.take("layer_norm_eps", default=1e-5, kind=float),
        rope_theta=theta,
        max_positions=keys.size("max_position_embeddings", default=2048),
        attention="causal",
        qkv_bias=bias,
        tied_head=keys.take("tie_word_embeddings", default=False, kind=bool),
        **keys.ids(),
        norm="layer",
        norm_bias=True,
        rotary_dim=int(head_dim * share),
        parallel=keys.take("use_parallel_residual", default=True, kind=bool),
        gated=False,
        activation=_ACTIVATIONS[keys.take("hidden_act", default="gelu")],
        out_bias=bias,
        mlp_bias=True,
    )
    return checked(keys, config, None)


def tensors(config: ModelConfig, names: Collection[str] = frozenset()) -> dict[tuple[str, ...], Tensor]:
    """Our paths -> tensor names."""
    block = "gpt_neox.layers.{layer}"
    table: dict[tuple[str, ...], Tensor] = {
        ("embed",): Tensor("gpt_neox.embed_in.weight"),
        ("final_norm",): Tensor("gpt_neox.final_layer_norm.weight"),
        ("final_norm_bias",): Tensor("gpt_neox.final_layer_norm.bias"),
    }
    for part, ours in enumerate("qkv"):
        fused = Fused(part, 3, config.head_dim)
        table["blocks", ours] = Tensor(f"{block}.attention.query_key_value.weight", transposed=True, fused=fused)
        if config.qkv_bias:
            table["blocks", f"{ours}_bias"] = Tensor(f"{block}.attention.query_key_value.bias", fused=fused)
    for ours, theirs in {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}.items():
        table["blocks", ours] = Tensor(f"{block}.{theirs}.weight")
        table["blocks", f"{ours}_bias"] = Tensor(f"{block}.{theirs}.bias")
    for ours, theirs in {"o": "attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}.items():
        table["blocks", ours] = Tensor(f"{block}.{theirs}.weight", transposed=True)
        if ours != "o" or config.out_bias:
            table["blocks", f"{ours}_bias"] = Tensor(f"{block}.{theirs}.bias")
    head = "lm_head.weight" if "lm_head.weight" in names else "embed_out.weight"
    return table if config.tied_head else table | {("head",): Tensor(head)}


def write(config: ModelConfig, diffusion: DiffusionSpec | None) -> dict[str, Any]:
    """The ``config.json`` of such a model, in the hub's flat spelling."""
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    return shape_keys(config) | {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "attention_bias": config.qkv_bias,
        "hidden_act": names[config.activation],
        "layer_norm_eps": config.norm_eps,
        "rotary_emb_base": config.rope_theta,
        "rotary_pct": config.rotary_dim / config.head_dim,
        "use_parallel_residual": config.parallel,
    }
